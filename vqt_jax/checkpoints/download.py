"""Local copies of checkpoints at https:// and gs:// addresses.

An interrupted download resumes where it stopped, also in a later process, which
fsspec and gcsfs do not do. A file gets its name only once its size, and its
checksum where the server tells one, are right.
"""

import base64
from collections.abc import Callable, Iterator
import contextlib
import glob
import hashlib
import netrc
import os
import pathlib
import re
import time
from typing import Any
import urllib.parse
import urllib.request

import fsspec

from vqt_jax.checkpoints import containers
from vqt_jax.errors import UserError
from vqt_jax.runtime import files
from vqt_jax.runtime import locks

# Called with (bytes so far, bytes in all or None) while a file comes in.
Progress = Callable[[int, int | None], None]

_GOOGLE = "https://storage.googleapis.com/"
_CHUNK = 8 << 20  # Bytes a request.
_MOST = 64 << 30  # Bytes of a file whose server does not tell how many it has.
_ATTEMPTS = 5  # In a row without a single new byte.
_SECONDS = 1.0  # Before the second attempt; doubles each time.


def fetch(
  address: str,
  cache_dir: str | os.PathLike[str] | None = None,
  progress: Progress | None = None,
) -> pathlib.Path:
  """Return the local copy of a checkpoint; download it if there is none.

  Args:
    address: https:// or gs:// address of an npz file, or gs:// address of a
      Big Vision checkpoint folder.
    cache_dir: where copies are kept; default: `files.cache_folder()`.
    progress: called after each chunk.

  Returns:
    Path of a complete file or folder.

  Raises:
    UserError: there is nothing at the address, it cannot be reached, or what
      came is not what the server announced.
  """
  if "?" not in address:  # Else it is signed for the web.
    address = address.replace(_GOOGLE, "gs://", 1)
  shown = without_secrets(address)
  if _SLASH_IN_PASSWORD.match(address):
    raise UserError(
      f"Cannot read {shown}: its password has a character that ends the name"
      " of a host. Write %2F in place of /, %3F of ?, and %23 of #."
    )
  scheme, _, rest = shown.partition("://")
  if scheme not in ("https", "http", "gs") or not address.isprintable():
    raise UserError(
      f"Cannot read {shown!a}: expected a path, a public name, or an https://"
      " or gs:// address."
    )
  cache = files.path(cache_dir) if cache_dir else files.cache_folder()
  parts = rest.split("/")
  if scheme == "gs":
    parts.insert(0, "storage.googleapis.com")
  elif scheme == "http":  # Anybody on the way may have changed what came.
    parts[0] = f"http://{parts[0]}"
  parts = [urllib.parse.quote(part, " ") for part in parts]
  target = cache.joinpath(*(p for p in parts if p not in ("", ".", "..")))
  if files.exists(target):
    return target
  try:
    if scheme == "gs":
      return _fetch_from_bucket(rest, target, progress)
    _download(_web(address), address, target, progress)
    return target
  except (FileNotFoundError, PermissionError) as error:
    advice = "or sign in with `gcloud auth application-default login`"
    raise UserError(
      f"There is no file {shown}, or you may not read it; check the address"
      f"{f', {advice}' if scheme == 'gs' else ''}."
    ) from error
  except ConnectionError as error:
    raise UserError(
      f"{shown} cannot be reached: {error}. Try again."
    ) from error


# An address that has `user:password@` with one of /?# in the password. (Digits
# before it are a port.)
_SLASH_IN_PASSWORD = re.compile(
  r"(https?://)([^/?#@]*:(?!\d*[/?#])[^/?#@]*[/?#].*)@", re.S
)


def without_secrets(source: str) -> str:
  """Return a source as it may be shown and stored.

  User, password and query of an address are left out; a few digits of a hash of
  user and query tell addresses apart. What this returns it leaves as it is.

  Args:
    source: as `load_backbone` takes it.
  """
  source = _SLASH_IN_PASSWORD.sub(
    lambda match: f"{match[1]}{urllib.parse.quote(match[2], ':')}@", source
  )
  place, subtree = containers.split_subtree(source)
  match = re.fullmatch(
    r"(?!gs:)([\w+.-]+://)([^/?#]*)([^?#]*)(.*)", place, re.S
  )
  user, at, host = match[2].rpartition("@") if match else ("", "", "")
  if not (match and (at or "?" in match[4])):
    return source
  secret = f"{user.partition(':')[0]}{match[4]}"
  digest = hashlib.sha256(secret.encode("utf-8", "replace")).hexdigest()[:8]
  shown = f"{match[1]}{host}{match[3]}#{digest}"
  return f"{shown}:{subtree}" if subtree else shown


def _web(address: str) -> fsspec.AbstractFileSystem:
  """File system that heeds proxies and gives up on dead servers.

  aiohttp would send what ~/.netrc holds over http as well, and to wherever a
  redirect leads; a header of ours it drops there.
  """
  import aiohttp

  scheme, _, rest = address.partition("://")
  host = re.sub(r"[/?#].*", "", rest, flags=re.S)
  # Compressed transfers have neither a length nor ranges.
  headers = {"Accept-Encoding": "identity"}
  if scheme == "https" and "@" not in host:
    headers |= _netrc_header(re.sub(r":\d*$", "", host))
  proxy = urllib.request.getproxies().get(scheme)
  return fsspec.filesystem(
    scheme,
    client_kwargs={
      "timeout": aiohttp.ClientTimeout(
        total=None, sock_connect=30, sock_read=60
      )
    },
    headers=headers,
    proxy=None if urllib.request.proxy_bypass(host) else proxy,
  )


def _netrc_header(host: str) -> dict[str, str]:
  """Header with the user's name and password in ~/.netrc, or $NETRC."""
  try:
    found = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
  except (OSError, ValueError, netrc.NetrcParseError):
    found = None
  if not found:
    return {}
  token = base64.b64encode(f"{found[0]}:{found[2]}".encode()).decode()
  return {"Authorization": f"Basic {token}"}


def _fetch_from_bucket(
  path: str, target: pathlib.Path, progress: Progress | None
) -> pathlib.Path:
  """Fetch without credentials, or with them if the bucket wants them."""
  files.set_up_buckets()
  try:
    anonymous = fsspec.filesystem("gcs", token="anon")
    return _fetch_object(anonymous, path, target, progress)
  except PermissionError:
    return _fetch_object(fsspec.filesystem("gcs"), path, target, progress)


def _fetch_object(
  filesystem: fsspec.AbstractFileSystem,
  path: str,
  target: pathlib.Path,
  progress: Progress | None,
) -> pathlib.Path:
  """Fetch a file, a checkpoint folder, or the folder that `-LAST` names."""
  try:
    kind = _request(filesystem.info, path)["type"]
  except FileNotFoundError:
    step = _request(filesystem.cat_file, f"{path}-LAST", start=0, end=100)
    step = step.decode(errors="replace").strip()
    target = files.below(target.parent, f"{target.name}-{step}")
    path, kind = f"{path}-{step}", "directory"
  if files.exists(target):
    return target
  if kind == "file":
    _download(filesystem, path, target, progress)
    return target
  partial = target.with_name(f"{target.name}.part")
  for file in sorted(_request(filesystem.find, path)):
    name = file.removeprefix(f"{path}/")
    # Two thirds of a training checkpoint are the optimiser's.
    if not re.match(r"chrono~|opt~(?!target~)", name):
      _download(filesystem, file, files.below(partial, name), progress)
  if not partial.exists():
    raise FileNotFoundError(path)
  with files.explain_write_errors(target):
    try:
      os.replace(partial, target)
    except OSError:
      if not target.exists():  # Else another process was faster.
        raise
  return target


def _download(
  filesystem: fsspec.AbstractFileSystem,
  path: str,
  target: pathlib.Path,
  progress: Progress | None,
) -> None:
  """Download a file, unless it is there; retry as long as bytes come in.

  Args:
    filesystem: where the file is.
    path: its path there.
    target: path of the copy.
    progress: called after each chunk.

  Raises:
    FileNotFoundError, PermissionError: the server says so.
    UserError: the file cannot be reached or written, or is not what the server
      announces.
  """
  failures = most = 0

  def report(done: int, total: int | None) -> None:
    nonlocal failures, most
    if done > most:
      failures, most = 0, done
    if progress:
      progress(done, total)

  while not target.exists():
    try:
      _resume(filesystem, path, target, report)
    except ConnectionError as error:
      failures += 1
      if failures == _ATTEMPTS:
        raise UserError(
          f"Downloading {without_secrets(path)} failed: {error}. Try again;"
          " what has come so"
          " far is kept."
        ) from error
      time.sleep(_SECONDS * 2 ** (failures - 1))


def _resume(
  filesystem: fsspec.AbstractFileSystem,
  path: str,
  target: pathlib.Path,
  progress: Progress,
) -> None:
  """Complete the part that is there, check it, and give it its name."""
  size, version, checksums = _describe(filesystem, path)
  part = target.with_name(f"{target.name}.{version}.part")
  writing = lambda: files.explain_write_errors(
    part, "set cache_dir, or VQT_JAX_CACHE, to another folder"
  )
  with writing():
    part.parent.mkdir(parents=True, exist_ok=True)
    out = locks.open_locked(part, wait=True)
  with out:
    with writing():
      if target.exists():  # Another process was faster.
        part.unlink(missing_ok=True)
        return
      start = out.seek(0, os.SEEK_END)
      if size is None:
        out.truncate(start := 0)
    for chunk in _chunks(filesystem, path, start, size):
      view = memoryview(chunk)
      with writing():
        while view:  # A nearly full disk takes a piece before it complains.
          view = view[out.write(view) :]
      start += len(chunk)
      progress(start, size)
    with writing():
      os.fsync(out.fileno())
      if problem := _problem(part, size, checksums):
        part.unlink()
      else:
        os.replace(part, target)
    if problem:
      raise ConnectionError(problem)
  for stale in target.parent.glob(f"{glob.escape(target.name)}.*.part"):
    with contextlib.suppress(OSError):
      stale.unlink()


def _describe(
  filesystem: fsspec.AbstractFileSystem, path: str
) -> tuple[int | None, str, dict[str, str]]:
  """Ask for a file's size, a tag of its version, and its base64 checksums."""
  info = _request(filesystem.info, path)
  checksums = {
    "md5": info.get("md5Hash") or info.get("Content-MD5"),
    "crc32c": info.get("crc32c"),
  }
  for digest in info.get("Digest", "").split(","):
    algorithm, _, value = digest.strip().partition("=")
    checksums[algorithm.lower().replace("sha-", "sha")] = value
  known = {name: value for name, value in checksums.items() if value}
  tags = [info.get(k) for k in ("size", "ETag", "generation", "Last-Modified")]
  version = hashlib.sha256(repr((tags, known)).encode()).hexdigest()[:8]
  return info.get("size"), version, known


def _chunks(
  filesystem: fsspec.AbstractFileSystem,
  path: str,
  start: int,
  size: int | None,
) -> Iterator[bytes]:
  """Yield the bytes of a remote file from `start` to `size`, if it has one."""
  if "http" in filesystem.protocol:
    yield from _stream(filesystem, path, start, size)
    return
  while start < size:
    end = min(start + _CHUNK, size)
    chunk = _request(filesystem.cat_file, path, start=start, end=end)
    if len(chunk) != end - start:
      raise ConnectionError(f"{len(chunk)} bytes came instead of {end - start}")
    start = end
    yield chunk


def _stream(
  filesystem: fsspec.AbstractFileSystem,
  path: str,
  start: int,
  size: int | None,
) -> Iterator[bytes]:
  """Yield like `_chunks`, from a server that may ignore ranges."""
  most = _MOST if size is None else size
  headers = dict(filesystem.kwargs["headers"])
  while start < most:
    if size is not None:
      headers["Range"] = f"bytes={start}-{min(start + _CHUNK, most) - 1}"
    with _request(
      filesystem.open,
      path,
      block_size=0,
      size=most,  # Else it asks for that once more.
      headers=headers,
    ) as stream:
      sends_all = stream.r.status == 200
      for skipped in range(0, start if sends_all else 0, _CHUNK):
        _read(stream, path, min(_CHUNK, start - skipped))
      while start < most:
        count = min(_CHUNK, most - start)
        chunk = _read(stream, path, count)
        start += len(chunk)
        yield chunk
        if len(chunk) < count and size is None:
          return
        if len(chunk) < count:
          raise ConnectionError(f"{start} bytes came instead of {size}")
        if not sends_all:
          break
  if size is None:
    raise UserError(
      f"{without_secrets(path)} sends more than {_MOST:,} bytes, and does not"
      " tell how many. Download it in another way, and give its path."
    )


def _read(stream: Any, path: str, count: int) -> bytes:
  """Read so many bytes of a stream; fewer only at its end."""
  chunk = bytearray()
  read = lambda path, left: stream.read(left)
  while left := count - len(chunk):
    piece = _request(read, path, left=left)
    if not piece:
      break
    chunk += piece
  return bytes(chunk)


def _request(method: Callable[..., Any], path: str, **kwargs: Any) -> Any:
  """Call a method of a file system; tell refusals from passing failures.

  Raises:
    FileNotFoundError, PermissionError: the server says so.
    ConnectionError: anything else; every file system has errors of its own.
  """
  try:
    return method(path, **kwargs)
  except Exception as error:
    # Over HTTP everything is "not found", with the reason as its cause.
    reason = error.__cause__ or error
    status = getattr(reason, "status", None) or getattr(reason, "code", None)
    # Without its cause, which may show what is secret in an address.
    if status in (401, 403) or str(error).startswith("Forbidden"):
      raise PermissionError(without_secrets(path)) from None
    if status in (404, 410) or type(reason) is FileNotFoundError:
      raise FileNotFoundError(without_secrets(path)) from None
    text = files.first_line(reason).rstrip(".")
    secret = lambda match: without_secrets(match[0])
    raise ConnectionError(re.sub(r"https?://[^\s'\"]+", secret, text)) from None


def _problem(
  part: pathlib.Path, size: int | None, checksums: dict[str, str]
) -> str:
  """Describe how a download differs from what was announced; "" if not."""
  found = part.stat().st_size
  if size not in (None, found):
    return f"{found} bytes came instead of {size}"
  for algorithm, expected in checksums.items():
    digest = _digest(part, algorithm)
    if digest and base64.b64encode(digest).decode() != expected:
      return f"its {algorithm} checksum is not the server's"
  return ""


def _digest(path: pathlib.Path, algorithm: str) -> bytes | None:
  """Digest of a file, or None if the algorithm is unknown here."""
  if algorithm == "crc32c":
    import google_crc32c  # Comes with gcsfs, as does what it checks.

    digest = google_crc32c.Checksum()
  elif algorithm in ("md5", "sha256", "sha512"):
    digest = hashlib.new(algorithm)
  else:
    return None
  with path.open("rb") as content:
    while chunk := content.read(_CHUNK):
      digest.update(chunk)
  return digest.digest()
