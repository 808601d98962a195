"""Compiled programs, kept for later processes: JAX's persistent cache."""

import contextlib
import hashlib
import os
import pathlib
import platform
import re
import stat
import warnings

import jax

from vqt_jax import errors
from vqt_jax.runtime import files

# Of this package; JAX's variables of these names, in capitals, win. Most
# programs take less than JAX's second to compile, and there are many.
_OPTIONS = {
  "jax_compilation_cache_max_size": 2**30,  # Bytes; the oldest ones go.
  "jax_persistent_cache_min_compile_time_secs": 0.1,
}


def keep_programs() -> None:
  """Keep compiled programs in the cache folder, for all of this process.

  JAX finds them by all that they depend on: program, versions, flags, devices.
  With JAX_COMPILATION_CACHE_DIR they are there, and with
  JAX_ENABLE_COMPILATION_CACHE=false nowhere; nor where the folder cannot be
  written to, or by others: what is in it is executed.
  """
  given = jax.config.jax_compilation_cache_dir is not None
  if given or not jax.config.jax_enable_compilation_cache:
    return
  with contextlib.suppress(errors.UserError, OSError):
    folder = files.cache_folder() / "programs" / _processor()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _is_private(folder):
      return
    _remove_unfinished(folder)
    for name, value in _OPTIONS.items():
      if name.upper() not in os.environ:
        jax.config.update(name, value)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # Of a full disk, or a damaged file: it is compiled instead.
    warnings.filterwarnings(
      "ignore", "Error (reading|writing) persistent compilation cache"
    )


def _remove_unfinished(folder: pathlib.Path) -> None:
  """Remove programs whose writer was killed: JAX dates them last of all."""
  for program in folder.glob("*-cache"):
    dated = program.with_name(f"{program.name.removesuffix('cache')}atime")
    if not dated.exists():
      program.unlink(missing_ok=True)


def _processor() -> str:
  """Return a name for processors for which XLA makes the same machine code."""
  known, fields = platform.machine(), "model name|flags|CPU part|Features"
  with contextlib.suppress(OSError):  # Linux.
    text = pathlib.Path("/proc/cpuinfo").read_text()
    known += "".join(sorted({*re.findall(rf"(?m)^(?:{fields})\s.*", text)}))
  return (
    f"{platform.machine()}-{hashlib.sha256(known.encode()).hexdigest()[:8]}"
  )


def _is_private(folder: pathlib.Path) -> bool:
  """Return whether this user owns a folder and nobody else can write to it."""
  found = folder.stat()
  others = stat.S_IWGRP | stat.S_IWOTH
  return (
    found.st_uid == os.getuid()
    and not found.st_mode & others
    and os.access(folder, os.W_OK | os.X_OK)
  )
