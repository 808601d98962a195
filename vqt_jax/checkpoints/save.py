"""Backbones out: Big Vision npz files."""

import os
import pathlib
from typing import Any

import numpy as np

from vqt_jax.checkpoints import names
from vqt_jax.errors import UserError
from vqt_jax.models.backbone import Backbone


def save_npz(path: str | os.PathLike[str], backbone: Backbone | Any) -> None:
  """Writes a backbone's parameters as Big Vision writes them.

  One sub-tree per block, no prefix: the layout that Big Vision,
  vision_transformer and third-party converters all read. Leaves keep their
  dtype (bfloat16 becomes two-byte void, as in Big Vision); `load_backbone`
  gives the same bits back.
  What the format has no place for (gelu, value range, a non-square grid, "mae"
  and "0" as pooling) is to be given again when loading.

  Args:
    path: where to; written under another name first, so that a file of this
      name is always whole.
    backbone: a `Backbone`, or its `params`.

  Raises:
    UserError: the file cannot be written.
  """
  params = backbone.params if isinstance(backbone, Backbone) else backbone
  leaves = {n: np.asarray(a) for n, a in names.flatten(params).items()}
  arrays = dict(sorted(names.unstack_blocks(leaves).items()))
  path = pathlib.Path(path).expanduser()
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
      with temporary.open("wb") as file:
        np.savez(file, **arrays)
        file.flush()
        os.fsync(file.fileno())
      os.replace(temporary, path)
    finally:
      temporary.unlink(missing_ok=True)
  except OSError as error:
    raise UserError(
      f"{path} cannot be written: {error.strerror}. Choose another place or"
      " free some space."
    ) from error
