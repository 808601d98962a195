"""Runs an exported model on images, without anything of this package.

  python run_exported.py PROGRAM IMAGES.npz ANSWERS.npz

PROGRAM is a .stablehlo or .onnx file, or the folder of a SavedModel. IMAGES.npz
holds uint8 arrays (b, h, w, 3); ANSWERS.npz gets NAME/OUTPUT for each.
"""

import os
import sys

import numpy as np


def main(place: str, images: str, answers: str) -> None:
  """Run as the top of this file says."""
  if os.path.isdir(place):
    import tensorflow as tf

    serve = tf.saved_model.load(place).signatures["serving_default"]
    call = lambda x: serve(images=tf.constant(x))
  elif place.endswith(".onnx"):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # It tells of each constant it folds.
    session = onnxruntime.InferenceSession(place, options)
    names = [output.name for output in session.get_outputs()]
    call = lambda x: dict(zip(names, session.run(None, {"images": x})))
  else:
    import jax

    with open(place, "rb") as file:
      call = jax.export.deserialize(bytearray(file.read())).call
  found = {}
  with np.load(images, allow_pickle=False) as file:
    for name in file.files:
      for output, value in call(file[name]).items():
        found[f"{name}/{output}"] = np.asarray(value)
  np.savez(answers, **found)


if __name__ == "__main__":
  main(*sys.argv[1:])
