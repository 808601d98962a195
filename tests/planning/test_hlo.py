"""Communication and traffic, read from the text of compiled programs."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import cases
from tests import helpers
import vqt_jax
from vqt_jax.features import images
from vqt_jax.features import store
from vqt_jax.models import sharding as sharding_lib
from vqt_jax.models import vit
from vqt_jax.planning import cost
from vqt_jax.planning import hlo
from vqt_jax.runtime import mesh as mesh_lib
from vqt_jax.training import step as step_lib

# Of each way to write a loop, a group and a start; nothing else matters.
TEXT = """\
HloModule jit_f, is_scheduled=true

%inner_cond (p: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(12)
  %p = (s32[]{:T(128)}, f32[8]{0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%inner (p.1: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p.1 = (s32[], f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%p.1), index=1
  %all-to-all.1 = f32[8]{0} all-to-all(%x), replica_groups=[2,4]<=[8]
  ROOT %t = (s32[], f32[8]{0}) tuple(%x, %all-to-all.1)
}

%fused (p.2: bf16[4,8]) -> bf16[4,8] {
  %p.2 = bf16[4,8]{1,0} parameter(0)
  ROOT %permute = bf16[4,8]{1,0} collective-permute(%p.2), \
source_target_pairs={{0,1},{1,0}}
}

%outer (p.3: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p.3 = (s32[], f32[8]{0}) parameter(0)
  %all-reduce.3 = (f32[8]{0}, /*index=1*/f32[2,8]{1,0:T(8,128)S(1)}) \
all-reduce(%p.3, %p.3), replica_groups=mesh['axis_0'=4,'axis_1'=2] \
{'axis_0'}, to_apply=%add
  %while.1 = (s32[], f32[8]{0}) while(%p.3), condition=%inner_cond, body=%inner
  ROOT %t.2 = (s32[], f32[8]{0}) tuple(%p.3, %while.1)
}

ENTRY %main (a: bf16[4,8]) -> bf16[4,8] {
  %a = bf16[4,8]{1,0} parameter(0)
  %ag = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%a), \
replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %ag.done = bf16[16,8]{1,0} all-gather-done(%ag)
  %f = bf16[4,8]{1,0} fusion(%a), kind=kOutput, calls=%fused
  %while.2 = (s32[], f32[8]{0}) while(%f), condition=%never, body=%outer, \
backend_config={"known_trip_count":{"n":"3"}}
  ROOT %r = bf16[4,8]{1,0} copy(%f)
}
"""


def test_communication_of_a_known_text():
  found = {each.kind: each for each in hlo.collectives(TEXT)}
  assert len(found) == len(hlo.collectives(TEXT)) == 4
  assert found["all-to-all"] == hlo.Collective(
    "all-to-all", 32, ("f32",), devices=4, times=36, loops=2
  )
  assert found["all-reduce"] == hlo.Collective(
    "all-reduce", 96, ("f32",), devices=4, times=3, loops=1
  )
  assert found["all-gather"] == hlo.Collective(
    "all-gather", 256, ("bf16",), devices=4, times=1, loops=0
  )
  assert found["collective-permute"].size == 64
  sent = {kind: each.sent for kind, each in found.items()}
  assert sent == {
    "all-to-all": 36 * 32 * 3 / 4,
    "all-reduce": 3 * 96 * 2 * 3 / 4,
    "all-gather": 256 * 3 / 4,
    "collective-permute": 64,
  }


def test_what_is_started_names_what_comes_out_behind_what_goes_in():
  line = (
    "  %s = ((f32[2,8], f32[4]), (f32[8,8], f32[16])) all-gather-start(%a,"
    " %b), replica_groups={{0,1,2,3}}, dimensions={0}"
  )
  assert hlo._operation(line).size == 4 * (64 + 16)
  line = (
    "  %s = (f32[64], f32[16], u32[], u32[]) reduce-scatter-start(%a),"
    " replica_groups={{0,1,2,3}}"
  )
  assert hlo._operation(line).size == 4 * 16


def test_memory_that_is_only_set_aside_is_no_traffic():
  text = """\
ENTRY %main (a: f32[64]) -> f32[64] {
  %a = f32[64]{0} parameter(0)
  %b = f32[1024]{0} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %c = f32[64]{0} copy(%a)
}
"""
  assert hlo.traffic(text) == 2 * 4 * 64


def test_products_are_those_of_all_devices():
  mesh = mesh_lib.make_mesh(2, 2)
  product = lambda x, y: x @ y
  rows = jax.sharding.PartitionSpec("data")
  of_parts = jax.shard_map(
    product,
    mesh=mesh,
    in_specs=(rows, jax.sharding.PartitionSpec()),
    out_specs=rows,
    axis_names={"data"},
  )
  x, y = jnp.ones((8, 16)), jnp.ones((16, 32))
  for function in (product, of_parts):
    assert cost.matmuls(jax.jit(function), x, y) == 2 * 8 * 16 * 32


def text_of(function, *shapes):
  shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return jax.jit(function).lower(*shapes).compile()


def test_traffic_without_loops_is_the_compilers():
  def f(x, w):
    return jnp.tanh(x @ w) @ w.T

  done = text_of(f, (64, 128), (128, 256))
  expected = done.cost_analysis()["bytes accessed"]
  assert hlo.traffic(done.as_text()) == pytest.approx(expected, rel=0.05)


def test_traffic_of_a_loop_is_of_every_turn_and_of_slices_only():
  """Each turn reads its own weights of the stack; the compiler says 1 turn."""
  depth, batch, width = 16, 8, 256

  def f(x, stack):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), x), x, stack)

  done = text_of(f, (batch, width), (depth, width, width))
  weights = 4 * depth * width * width
  found = hlo.traffic(done.as_text())
  assert weights < found < 4 * weights  # Read once, maybe copied before.
  assert found < depth * weights / 2  # What whole stacks in every turn take.


def exchanged(method, stored=False, data=4, model=1):
  """What a step of a tiny method exchanges, on four devices."""
  mesh = mesh_lib.make_mesh(data, model)
  config = helpers.tiny_config(image_size=(16, 16), dtype="bfloat16")
  tuner = vqt_jax.make_tuner(method, config, 5)
  case = cases.train(tuner, 16, stored=stored, steps=2, rows=32)
  done = cost.compile_for(mesh, case.function, *case.shapes(mesh))
  trained = sum(x.size for x in jax.tree.leaves(tuner.shapes()))
  return hlo.collectives(done.as_text()), 4 * trained


@pytest.mark.parametrize(
  "method, stored",
  [("vqt", False), ("vqt", True), ("bitfit", False)],
)
def test_gradients_are_summed_once_a_step_in_float32(method, stored):
  """All of them together, and none inside the loop over blocks."""
  found, trained = exchanged(method, stored)
  sums = [each for each in found if each.kind == "all-reduce"]
  gradients = [each for each in sums if each.size >= trained]
  assert len(gradients) == 1
  assert gradients[0].times == 2 and gradients[0].loops == 1  # Of steps.
  assert gradients[0].dtypes == ("f32",)
  # Beside them there are loss and the like.
  assert sum(each.size for each in sums) < trained + 64
  assert all(each.loops == 1 for each in sums)


@pytest.mark.parametrize("size", [(16, 16), (6, 8), (6, 6), (7, 7)])
def test_a_batch_of_images_is_exchanged_and_not_summed(size):
  """Whatever the number of devices cuts: rows, columns, or neither."""
  mesh = mesh_lib.make_mesh()
  data = images.image_shapes(24, size, mesh, "float32")
  index = jax.ShapeDtypeStruct((16,), jnp.int32)
  done = cost.compile_for(mesh, jax.jit(step_lib.take), data, index)
  found = {each.kind for each in hlo.collectives(done.as_text())}
  # 7 x 7 x 3 numbers cannot be cut at all.
  assert ("all-reduce" in found) == (size == (7, 7))


def test_extraction_exchanges_features_once():
  """The backbone runs on whole tokens, though the store cuts them across."""
  mesh = mesh_lib.make_mesh()
  config = helpers.tiny_config(image_size=(16, 16))
  layout = store.Layout(config, True, "float32", mesh)
  params = vit.param_shapes(config)
  params = sharding_lib.backbone_shapes(params, mesh, "float32")
  images = jax.ShapeDtypeStruct(
    (16, 16, 16, 3), jnp.float32, sharding=mesh_lib.batch_sharding(mesh)
  )
  done = cost.compile_for(mesh, store.extractor(layout), params, images)
  found = hlo.collectives(done.as_text())
  assert sorted(each.kind for each in found) == ["all-gather", "all-to-all"]
  assert all(each.loops == 0 for each in found)
