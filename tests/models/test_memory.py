"""What the frozen stream saves: no backward pass, no residuals.

Operations and temporary memory of compiled steps, against full fine-tuning and
against what a step ought to cost. Nothing is run.
"""

import functools

import jax
import pytest

from benchmarks import cases
from vqt_jax.models import tuner as tuner_lib
from vqt_jax.models import vit_config
from vqt_jax.planning import cost
from vqt_jax.training import trial_memory

BATCH = 32
CONFIG = vit_config.ViTConfig(
  width=64,
  depth=6,
  mlp_dim=256,
  num_heads=4,
  patch_size=(4, 4),
  image_size=(32, 32),
)
TOKEN_BYTES = 4 * CONFIG.depth * BATCH * CONFIG.num_tokens * CONFIG.width


def tuner_of(num_queries: int, config=CONFIG) -> tuner_lib.Tuner:
  """VQT, or with 0 queries the linear probe."""
  method = "vqt" if num_queries else "linear"
  return tuner_lib.make_tuner(
    method, config, cases.NUM_CLASSES, num_queries=num_queries or 1
  )


def temporary_bytes(case: cases.Case, shapes=None) -> int:
  compiled = case.function.lower(*(shapes or case.shapes())).compile()
  return compiled.memory_analysis().temp_size_in_bytes


@functools.cache
def step_bytes(num_queries: int) -> int:
  return temporary_bytes(cases.train(tuner_of(num_queries), BATCH))


def test_step_needs_a_fraction_of_full_fine_tuning():
  full = cases.finetune(CONFIG, cases.NUM_CLASSES, BATCH)
  # An eighth today; a third is what must never be lost.
  assert 3 * step_bytes(1) < temporary_bytes(full)


def test_step_keeps_the_tokens_and_little_else():
  """One more (B, N, D) per block, or per MLP, would break this."""
  beyond_linear = step_bytes(1) - step_bytes(0)
  assert TOKEN_BYTES <= beyond_linear < 2 * TOKEN_BYTES


def test_scores_of_one_head_at_a_time():
  config = vit_config.ViTConfig(
    width=32,
    depth=2,
    mlp_dim=32,
    num_heads=8,
    patch_size=(2, 2),
    image_size=(32, 32),
  )
  of_one = 4 * BATCH * config.num_tokens**2
  step = temporary_bytes(cases.train(tuner_of(1, config), BATCH))
  assert step < config.num_heads * of_one


def test_step_from_the_store_holds_no_batch_of_tokens():
  """Each block fetches its own, in the gradient as well."""
  stored = cases.train(tuner_of(1), BATCH, stored=True, rows=2 * BATCH)
  assert temporary_bytes(stored) < TOKEN_BYTES


@pytest.mark.parametrize(
  "runs, num_queries, stored",
  [
    (1, 0, False),
    (3, 1, False),
    (1, 10, False),
    (3, 0, True),
    (1, 1, True),
    (3, 10, True),
  ],
)
def test_step_computes_the_forward_pass_and_the_reading(
  runs, num_queries, stored
):
  """Nothing goes back through the backbone, and no run repeats the stream."""
  config = cases.vit_config("S/14", 224, "bfloat16")
  tuner = tuner_of(num_queries, config)
  case = cases.train(tuner, 8, stored=stored, runs=runs, steps=2)
  counted = cost.matmuls(case.function, *case.shapes())
  assert counted == pytest.approx(case.expected, rel=0.03)


@pytest.mark.parametrize(
  "num_queries, runs", [(0, 8), (1, 8), (10, 4), ("head2toe", 8)]
)
def test_memory_of_a_run_is_foreseen(num_queries, runs):
  """A bit too much rather than too little: packs are made by it.

  Features that no run changes exist once.
  """
  config = cases.vit_config("S/16", 64, "float32")
  if num_queries == "head2toe":
    tuner = tuner_lib.make_tuner("head2toe", config, 10)
  else:
    tuner = tuner_of(num_queries, config)
  temporary = []
  for count in (runs, 2 * runs):
    case = cases.train(tuner, BATCH, stored=True, runs=count)
    shapes = case.shapes()
    temporary.append(temporary_bytes(case, shapes))
  state = jax.tree.leaves(shapes[len(case.static)])
  held = sum(x.size * x.dtype.itemsize for x in state) / count
  needed = (temporary[1] - temporary[0]) / runs + held
  assert 1 < trial_memory.bytes_per_trial(tuner, BATCH) / needed < 2


def test_count_of_full_fine_tuning():
  """The count sees a backward pass where there is one."""
  case = cases.finetune(CONFIG, cases.NUM_CLASSES, BATCH, steps=2)
  counted = cost.matmuls(case.function, *case.shapes())
  assert counted == pytest.approx(case.expected, rel=0.03)
  assert counted > 2.5 * cases.train(tuner_of(0), BATCH, steps=2).expected
