"""Descriptions of files and folders that hold no checkpoint."""

from collections.abc import Iterable
import pathlib
import re

_OTHER = "; take the safetensors of the same model."
_CONVERT = (
  "which is never loaded, as it could run any program; take the safetensors of"
  " the same model, or convert it with torch.load(..., weights_only=True) and"
  " safetensors.torch.save_file."
)
PICKLE = f"is a PyTorch pickle, {_CONVERT}"
_AGAIN = "Copy or download it again."
# By their first bytes, longest first.
_BY_START = {
  b"version https://git-lfs": (
    "only names the file that Git LFS keeps; get that with `git lfs pull`."
  ),
  b"\x93NUMPY": (
    "is a single NumPy array; expected an npz with one array a parameter."
  ),
  b"\x89HDF": f"is a Keras model{_OTHER}",
  b"GGUF": f"is a quantised GGUF model{_OTHER}",
  b"\x80": f"is a Python pickle, {_CONVERT}",
  b"<": "is a web page; download the file itself.",
}
_BY_NAME = {
  r"\.(bin|pt|pth|ckpt)$": PICKLE,
  r"\.onnx$": f"is an ONNX graph{_OTHER}",
  r"\.msgpack$": f"is a Flax checkpoint in msgpack{_OTHER}",
  r"\.(h5|keras)$": _BY_START[b"\x89HDF"],
  r"\.pb$": f"is a TensorFlow graph{_OTHER}",
  r"\.gguf$": _BY_START[b"GGUF"],
}


def describe(path: pathlib.Path) -> str:
  """Describe a file that is not one of weights, as the end of a sentence."""
  with path.open("rb") as file:
    start = file.read(24)
  if not start:
    return f"is empty. {_AGAIN}"
  if start.startswith(b"PK"):
    if path.name.endswith(".safetensors"):
      return "is a zip file, not one of safetensors; give it its own name."
    return f"is truncated: its end is missing. {_AGAIN}"
  for first, text in _BY_START.items():
    if start.startswith(first):
      return text
  return _describe_name(path.name) or (
    "is neither an npz file nor one of safetensors; expected a checkpoint of"
    " Big Vision, Hugging Face, timm or OpenCLIP."
  )


def describe_names(names: Iterable[str]) -> str:
  """Describe the files of a model without weights that are read, likewise."""
  names = sorted(names)
  for name in names:
    if name.endswith(".safetensors"):
      if re.search(r"-\d+-of-\d+\.", name):
        index = re.sub(r"-\d+-of-\d+(.*)", r"\1.index.json", name)
        return f"has parts of a model, but no {index}. Copy it too."
      return f"has no model.safetensors; if {name} is the one, give its path."
  for name in names:
    if text := _describe_name(name):
      return f"has no safetensors: {name} {text}"
  return (
    "holds no Big Vision arrays and no safetensors; name an npz file, a"
    " checkpoint.bv-STEP folder, or a folder with model.safetensors."
  )


def has_known_ending(name: str) -> bool:
  """Return whether a name ends as files of weights do, read or not."""
  known = name.endswith((".npz", ".safetensors"))
  return known or _describe_name(name) is not None


def _describe_name(name: str) -> str | None:
  found = (text for end, text in _BY_NAME.items() if re.search(end, name))
  return next(found, None)
