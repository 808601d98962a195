"""Models of the Hugging Face hub: `hf://OWNER/NAME`, `hf://OWNER/NAME@REVISION`.

By `huggingface_hub`, so that its cache, tokens, mirrors (`HF_ENDPOINT`) and
offline mode hold here too. Only safetensors and their small JSON files are
fetched.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import contextlib
import logging
import os
import pathlib
import re
from typing import Any
import warnings

from vqt_jax.checkpoints import file_kinds
from vqt_jax.checkpoints import safetensors_files
from vqt_jax.errors import UserError
from vqt_jax.runtime import files

# The rules of the hub for names, and no revision that leads out of the cache.
_PART = r"\b[\w.-]{1,96}\b"
_NAME = (
  rf"(?!.*\.\.|[^@]*(?:--|\.git(?:@|$)))({_PART}/{_PART})(?:@(\w[\w.+/-]*))?"
)
_LOUD = ("huggingface_hub", "httpx", "httpx2")


class NotFetched(UserError):
  """There is no such model, or none was reached and none is in the cache."""


def is_address(place: str) -> bool:
  return place.startswith("hf://")


def is_name(text: str) -> bool:
  """Return whether `hf://` and this text may be the address of a model."""
  found = re.fullmatch(_NAME, text, re.ASCII)
  return bool(found) and not file_kinds.has_known_ending(text)


def parse(address: str) -> tuple[str, str | None]:
  """Return OWNER/NAME of an address, and the revision if it has one.

  Raises:
    UserError: it is no address of the hub.
  """
  found = re.fullmatch(f"hf://{_NAME}", address, re.ASCII)
  if not found:
    shown = re.sub("//.*@", "//", address)  # Some write passwords there.
    raise UserError(
      f"Cannot use {shown!a}: expected hf://OWNER/NAME, or"
      " hf://OWNER/NAME@REVISION of a branch, tag or commit."
    )
  return found[1], found[2]


def fetch(
  address: str,
  cache_dir: str | os.PathLike[str] | None = None,
  progress: Callable[[int, int | None], None] | None = None,
  names: Sequence[str] = (),
) -> pathlib.Path:
  """Return the weights of a model on the hub; download them if need be.

  If the hub is not reached, or refuses, what is in the cache is taken.

  Args:
    address: `hf://OWNER/NAME`, with `@` and a branch, tag or commit.
    cache_dir: where copies are kept; default: the hub's own cache.
    progress: called with bytes so far and in all (None: unknown), if any come.
    names: of the files to fetch, weights last, all of which must be there;
      default: what `load_backbone` reads.

  Returns:
    File of safetensors, or index of several, among the other files of the
    model, in a folder that has the name of the commit.

  Raises:
    NotFetched: there is no such model, or none was reached and none is here.
    UserError: this is no address; or the model is gated, has no safetensors, or
      cannot be written.
  """
  name, revision = parse(address)
  with quiet():
    from huggingface_hub import constants

    cache = cache_dir or constants.HF_HUB_CACHE
    try:
      return _download(name, revision, cache, progress, names)
    except UserError:
      raise
    except Exception as error:
      if cached := _find_cached(name, revision, cache, names[-1:]):
        return cached
      # Without its cause, which may show the token.
      raise _explain(error, name, revision, cache) from None


def find_cached(source: str, commit: str) -> pathlib.Path | None:
  """Return the weights of a model in the cache, without asking the hub.

  Args:
    source: as `load_backbone` takes it; its own revision does not count.
    commit: of the model.

  Returns:
    As `fetch`; None: they are not there, or the source is not of the hub.
  """
  name = source.removeprefix("hf://").partition("@")[0]
  if not is_name(f"{name}@{commit}"):
    return None
  with quiet():
    from huggingface_hub import constants

    return _find_cached(name, commit, constants.HF_HUB_CACHE)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Keep log lines and warnings from the console: what matters is raised."""
  loggers = {name: logging.getLogger(name) for name in _LOUD}
  levels = {name: logger.level for name, logger in loggers.items()}
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    try:
      for logger in loggers.values():
        logger.setLevel(logging.CRITICAL + 1)
      yield
    finally:
      for name, logger in loggers.items():
        logger.setLevel(levels[name])


def _download(
  name: str,
  revision: str | None,
  cache: str | os.PathLike[str],
  progress: Callable[[int, int | None], None] | None,
  names: Sequence[str],
) -> pathlib.Path:
  """Download what is not in the cache; raise whatever the library raises."""
  import huggingface_hub

  hub = huggingface_hub.HfApi()
  listed = hub.model_info(name, revision=revision, files_metadata=True).siblings
  sizes = {each.rfilename: each.size for each in listed or ()}
  wanted, done = names or _choose(sizes), 0
  if missing := [file for file in wanted if file not in sizes]:
    raise UserError(f"hf://{name} has no file {missing[0]}.")
  if not wanted:
    raise UserError(f"hf://{name} {file_kinds.describe_names(sizes)}")
  total = (
    None if None in map(sizes.get, wanted) else sum(map(sizes.get, wanted))
  )

  def report(more: int) -> None:
    nonlocal done
    done += more
    if progress:
      progress(done, total)

  folder, commit = None, revision
  for file in wanted:
    before = done
    found = hub.hf_hub_download(
      name, file, revision=commit, cache_dir=cache, tqdm_class=_bar(report)
    )
    done = before + (sizes[file] or 0)
    folder = pathlib.Path(found).parent
    commit = folder.name  # A branch may move on between two files.
  return folder / names[-1] if names else safetensors_files.find_in(folder)


def _choose(names: Iterable[str]) -> list[str]:
  """Names of the files to fetch, weights last; none if there are no weights."""
  names = list(names)
  weights = next((n for n in safetensors_files.WEIGHTS if n in names), None)
  if not weights:
    return []
  stem = weights.partition(".")[0]
  parts = rf"{stem}-\d+-of-\d+\.safetensors"
  more = [name for name in names if re.fullmatch(parts, name)]
  return [
    *(name for name in safetensors_files.CONFIGS if name in names),
    weights,
    *(sorted(more) if weights.endswith(".json") else []),
  ]


def _bar(report: Callable[[int], None]) -> type:
  """Class of progress bars that show nothing, but report what has come."""
  import tqdm

  class Bar(tqdm.tqdm):
    def __init__(self, *args: Any, **kwargs: Any):
      del args, kwargs
      super().__init__(disable=True)

    def update(self, n: float | None = 1) -> None:
      report(int(n or 0))

    # Bytes from the network, of which `update` tells when they are written.
    def update_transfer(self, n: float | None = 1) -> None:
      pass

    def set_transfer_postfix_str(self, *args: Any, **kwargs: Any) -> None:
      pass

  return Bar


def _find_cached(
  name: str,
  revision: str | None,
  cache: str | os.PathLike[str],
  weights: Sequence[str] = (),
) -> pathlib.Path | None:
  import huggingface_hub

  for file in weights or safetensors_files.WEIGHTS:
    found = huggingface_hub.try_to_load_from_cache(
      name, file, cache_dir=cache, revision=revision
    )
    if isinstance(found, str):
      return pathlib.Path(found)
  return None


def _explain(
  error: Exception,
  name: str,
  revision: str | None,
  cache: str | os.PathLike[str],
) -> UserError:
  """Return what is to be raised in place of an error of the library."""
  from huggingface_hub import errors as hub_errors

  while isinstance(error, hub_errors.LocalEntryNotFoundError):
    error = error.__cause__ or RuntimeError("a file is missing")
  endpoint = shown_endpoint()
  address = f"hf://{name}" + (f"@{revision}" if revision else "")
  status = getattr(getattr(error, "response", None), "status_code", None)
  set_token = "set HF_TOKEN to a token that may read it"
  match error:
    case hub_errors.GatedRepoError():
      return UserError(
        f"{address} is gated: accept its conditions at {endpoint}/{name}, and"
        " set HF_TOKEN to a token of the account that did."
      )
    case hub_errors.RepositoryNotFoundError():
      return NotFetched(
        f"There is no model {name} at {endpoint}, or it is private: check the"
        f" name, or {set_token}."
      )
    case hub_errors.RevisionNotFoundError():
      return NotFetched(
        f"{name} has no revision {revision or 'main'!r} at {endpoint}: name a"
        " branch, tag or commit after the @."
      )
    case hub_errors.OfflineModeIsEnabled():
      return NotFetched(
        f"{address} is not in the cache {cache}, and HF_HUB_OFFLINE forbids"
        " fetching it: unset that once, or copy a cache that has it."
      )
    case OSError() if error.errno and not isinstance(error, ConnectionError):
      return UserError(
        f"Cannot write {cache}: {error.strerror}. Free some space there, or set"
        " HF_HOME to another folder."
      )
  if status in (401, 403):
    return UserError(
      f"{endpoint} refuses {address} ({status}): {set_token}, or unset one that"
      " has expired."
    )
  return NotFetched(
    f"{address} cannot be fetched from {endpoint}: {reason(error)} Try again;"
    " files that came whole are kept."
  )


def shown_endpoint() -> str:
  """Address of the hub or its mirror, without a password."""
  from huggingface_hub import constants

  return re.sub("//[^/]*@", "//", constants.ENDPOINT)


def reason(error: Exception) -> str:
  """First line of an error of the library, without passwords and the token."""
  import huggingface_hub

  text = re.sub("//[^/ ]*@", "//", files.first_line(error))
  token = huggingface_hub.get_token()
  return text.replace(token, "...") if token else text
