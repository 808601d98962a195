"""Upload what a run has trained to the Hugging Face hub.

  vqt-jax share runs/photos --to hf://OWNER/NAME

and `python -m vqt_jax.share` with the same arguments: the workdir of a finished
run, or a bundle (its tuned/). Its weights, bundle.json and model card are
uploaded, nothing else, and not the backbone. A bundle that is there is
replaced, in one commit.

--to hf://OWNER/NAME   the model; is made if there is none
--public               everybody may read it; default: it is private

Needs a token that may write: `hf auth login`, or HF_TOKEN.

Exit status: 0, or 2 if there is something to correct.
"""

from collections.abc import Sequence
import sys

from absl import flags
from etils import epy

from vqt_jax import errors
from vqt_jax.runtime import console as console_lib
from vqt_jax.runtime import files
from vqt_jax.tuned import arguments as arguments_lib

with epy.lazy_imports():  # JAX takes seconds; --help needs none.
  from vqt_jax import checkpoints
  from vqt_jax.tuned import bundle
  from vqt_jax.tuned import card

USAGE = "Usage: RUN --to hf://OWNER/NAME [--public] (--help tells more)."


def main(argv: Sequence[str]) -> int:
  """Share as a command line says; return the exit status."""
  values = flags.FlagValues()
  flags.DEFINE_string("to", None, "", flag_values=values)
  flags.DEFINE_boolean("public", False, "", flag_values=values)

  def command(arguments):
    if len(arguments) != 1 or not values.to:
      missing = "one run" if len(arguments) != 1 else "--to"
      raise errors.UserError(f"Expected {missing}. {USAGE}")
    share(arguments[0], values.to, values.public)
    return 0

  interrupted = "Interrupted; the hub has all files or none."
  return arguments_lib.run(argv, values, __doc__, command, interrupted)


def share(run: str, address: str, public: bool = False) -> None:
  """Upload a bundle, see the top of this file.

  Raises:
    UserError: it is no bundle, or damaged; see `hub_upload.upload` for others.
  """
  folder = bundle.find(run)
  info = bundle.read(folder).info
  if not info["format"]:
    raise errors.UserError(
      f"{folder} was written by an earlier version: save it again, with"
      f" vqt_jax.load({str(run)!r}).save(FOLDER), and share that."
    )
  readme = card.model_card(info).encode()
  if files.exists(folder / bundle.CARD):
    readme = files.read(folder / bundle.CARD)
  contents = {
    bundle.WEIGHTS: files.read(folder / bundle.WEIGHTS),
    bundle.INFO: files.read(folder / bundle.INFO),
    bundle.CARD: readme.replace(b'"this/folder"', f'"{address}"'.encode()),
  }
  place = checkpoints.upload(address, contents, public)
  console = console_lib.Console(sys.stdout)
  console.note(f"{place} ({'public' if public else 'private'})", "shared")
  console.note(f'vqt_jax.load("{address}")', "load")
  console.note(
    f"{info['backbone']['source']}, which is not uploaded", "backbone"
  )


if __name__ == "__main__":
  sys.exit(main(sys.argv))
