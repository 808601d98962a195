"""What a run imports late, for forked processes to find it imported."""

import importlib

import tensorflow_datasets as tfds

for _name in (
  "jinja2",
  "matplotlib.backends.backend_agg",
  "matplotlib.backends.backend_svg",
  "orbax.checkpoint",
  "tensorboard.plugins.hparams.summary_v2",
  "tensorboard.summary",
  "tensorflow",
  "vqt_jax.experiments.train",
  "vqt_jax.reports.run_figure",
  "vqt_jax.training.launch",
  "vqt_jax.training.run",
):
  importlib.import_module(_name)
tfds.list_builders(with_community_datasets=False)  # Imports all of them.
