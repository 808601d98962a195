"""Prepare datasets once, for all later runs.

  python -m vqt_jax.data.prepare cifar100 kitti --data_dir DATA
  python -m vqt_jax.data.prepare all --data_dir DATA --manual_dir FILES

and, where it was installed with pip, `vqt-jax prepare` with the same arguments.

Names are VTAB-1k tasks, datasets of TFDS (`name[/config][:version]`), or `all`
for what the 19 tasks need. What is prepared already is left alone. A run
never downloads data; this program does.

--data_dir DIR      TFDS folder to write to; default: ~/tensorflow_datasets, or
                    $TFDS_DATA_DIR
--download_dir DIR  folder for downloads; default: DATA_DIR/downloads
--manual_dir DIR    folder with files that you have already, under their
                    original names; default: DATA_DIR/downloads/manual
--trust_files       take these files even if they are not those that TFDS has
                    recorded (other bytes with the same content, such as an
                    archive packed anew)
"""

from collections.abc import Sequence
import importlib.util
import sys
from typing import Any

from absl import flags
from absl import logging
from etils import epath

from vqt_jax import errors
from vqt_jax.data import builders
from vqt_jax.data import vtab
from vqt_jax.data.tensorflow_lazy import quiet
from vqt_jax.data.tensorflow_lazy import tf
from vqt_jax.data.tensorflow_lazy import tfds

FOLDERS = ("data_dir", "download_dir", "manual_dir")

# TFDS dataset -> (module, package that has it), needed to prepare it only.
_OPENCV = ("cv2", "opencv-python-headless")
_SCIPY = ("scipy", "scipy")
_H5PY = ("h5py", "h5py")
PACKAGES = {
  "oxford_flowers102": _SCIPY,
  "svhn_cropped": _SCIPY,
  "sun397": _OPENCV,
  "kitti": _OPENCV,
  "diabetic_retinopathy_detection": _OPENCV,
  "patch_camelyon": _H5PY,
  "dsprites": _H5PY,
}

# Printed before preparing: sizes of downloads, files to get by hand, and known
# problems.
NOTES = {
  "caltech101": "137 MB from data.caltech.edu.",
  "cifar100": "169 MB from cs.toronto.edu.",
  "dtd": "625 MB from robots.ox.ac.uk; for research purposes.",
  "oxford_flowers102": (
    "345 MB from robots.ox.ac.uk; checksum mismatches were reported."
  ),
  "oxford_iiit_pet": (
    "811 MB from thor.robots.ox.ac.uk; checksum mismatches were reported."
  ),
  "svhn_cropped": "1.6 GB from ufldl.stanford.edu.",
  "sun397": (
    "39 GB from vision.princeton.edu, an address that was reported dead:"
    " you may have to get the archive elsewhere, and give it by"
    " --manual_dir."
  ),
  "patch_camelyon": "8 GB from zenodo.org.",
  "eurosat": (
    "94 MB from madm.dfki.de; if its certificate is refused, give the same"
    " file from a mirror by --manual_dir."
  ),
  "resisc45": (
    "Not downloadable: get NWPU-RESISC45 from its authors and extract it so"
    " that MANUAL_DIR/NWPU-RESISC45/<class>/*.jpg exist."
  ),
  "diabetic_retinopathy_detection": (
    "Not downloadable: accept the rules of Kaggle's Diabetic Retinopathy"
    " Detection competition, join the parts of its archives (cat) and"
    " extract them so that MANUAL_DIR holds train/, test/, sample/ and"
    " trainLabels.csv."
  ),
  "clevr": "19 GB from dl.fbaipublicfiles.com.",
  "dmlab": "3 GB from Google Cloud Storage.",
  "kitti": "12.6 GB from Amazon S3; KITTI has terms of its own.",
  "dsprites": "28 MB from github.com.",
  "smallnorb": "263 MB from cs.nyu.edu.",
}


def requests(names: Sequence[str]) -> list[str]:
  """Return TFDS requests for names of tasks or datasets, each dataset once."""
  found = []
  for name in names:
    if name == vtab.ALL:
      found += [task.builder for task in vtab.VTAB.values()]
    elif task := vtab.find_task(name):
      found.append(task.builder)
    else:
      found.append(name)
  return list(dict.fromkeys(found))


def prepare(
  request: str,
  *,
  data_dir: str | None = None,
  download_dir: str | None = None,
  manual_dir: str | None = None,
  trust_files: bool = False,
) -> Any:
  """Prepare one dataset, unless it is prepared; return its TFDS builder.

  Args:
    request: `name[/config][:version]`.
    data_dir: TFDS folder.
    download_dir: folder for downloads.
    manual_dir: folder with files that the user has.
    trust_files: whether those may have other checksums than recorded.

  Raises:
    UserError: something is missing or cannot be downloaded or written.
  """
  builder = builders.find_builder(request, data_dir)
  with quiet():
    if builder.is_prepared():
      return builder
  if builder.data_path.exists():
    raise errors.UserError(
      f"{builder.data_path} exists but holds no finished dataset. Move that"
      " folder away and try again."
    )
  _check_packages(builder.name)
  if builder.name in NOTES:
    print(f"{builder.name}: {NOTES[builder.name]}", flush=True)
  if trust_files:
    _trust(builder, manual_dir)
  _generate(builder, download_dir, manual_dir)
  return builder


def _check_packages(name: str) -> None:
  module, package = PACKAGES.get(name, (None, None))
  if module and importlib.util.find_spec(module) is None:
    raise errors.UserError(
      f"Preparing {name!r} needs the Python package {package!r} (reading it"
      f" later does not): pip install {package}"
    )


def _trust(builder: Any, manual_dir: str | None) -> None:
  """Record the checksums of the user's files, in memory only."""
  if not manual_dir:
    raise errors.UserError(
      "--trust_files needs --manual_dir, the folder of the files to trust."
    )
  for url, info in list((builder.url_infos or {}).items()):
    path = epath.Path(manual_dir).expanduser() / info.filename
    if path.exists():
      print(f"{builder.name}: trusting {path}", flush=True)
      builder.url_infos[url] = tfds.core.download.checksums.compute_url_info(
        path
      )


def _generate(
  builder: Any, download_dir: str | None, manual_dir: str | None
) -> None:
  download = tfds.core.download
  urls = builder.url_infos or {}
  files = ", ".join(info.filename for info in urls.values())
  try:
    builder.download_and_prepare(
      download_dir=download_dir,
      download_config=tfds.download.DownloadConfig(manual_dir=manual_dir),
    )
  except download.download_manager.NonMatchingChecksumError as error:
    raise errors.UserError(
      f"A file of {builder.name!r} is not the one TFDS has recorded:"
      f" {_one_line(error)}"
      " If you are sure of your files, give them by --manual_dir and add"
      " --trust_files."
    ) from error
  except (
    download.util.DownloadError,
    download.extractor.ExtractError,
    OSError,
    RuntimeError,  # TFDS makes them of TensorFlow's errors.
    tf.errors.OpError,
    AssertionError,
    ImportError,
    ValueError,  # A version that this TFDS can read, but not make.
  ) as error:
    raise errors.UserError(
      f"Preparing {builder.name!r} failed: {_one_line(error)} Files that"
      " you have can be given by --manual_dir, under their original names"
      + (f": {files}." if files else ".")
    ) from error


def _one_line(error: Exception) -> str:
  return " ".join(str(error).split()).rstrip(".") + "."


def main(argv: Sequence[str]) -> int:
  """Prepare what a command line names; return the exit status."""
  values = flags.FlagValues()
  for name in FOLDERS:
    flags.DEFINE_string(name, None, "", flag_values=values)
  flags.DEFINE_boolean("trust_files", False, "", flag_values=values)
  flags.DEFINE_boolean("help", False, "", short_name="h", flag_values=values)
  try:
    names = values(list(argv))[1:]
  except flags.Error as e:
    print(f"error: {e}", file=sys.stderr)
    return 2
  if values.help:
    print(__doc__)
    return 0
  if not names:
    print(
      "error: Name the datasets to prepare, or `all` (--help tells more).",
      file=sys.stderr,
    )
    return 2
  logging.set_verbosity(logging.WARNING)  # TFDS draws its progress anyway.
  settings = {name: values[name].value for name in (*FOLDERS, "trust_files")}
  status = 0
  for request in requests(names):
    try:
      builder = prepare(request, **settings)
      splits = builder.info.splits.items()
      sizes = ", ".join(f"{name} {x.num_examples}" for name, x in splits)
      place = f"{builder.name}: ready in {builder.data_path}"
      print(f"{place} ({sizes})", flush=True)
    except errors.UserError as error:
      print(error, file=sys.stderr, flush=True)
      status = 2
  return status


if __name__ == "__main__":
  sys.exit(main(sys.argv))
