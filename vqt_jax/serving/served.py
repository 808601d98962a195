"""The models that are served, which are replaced when their bundles are."""

from collections.abc import Callable, Sequence
import os
import threading

from vqt_jax import checkpoints
from vqt_jax import errors
from vqt_jax.runtime import files
from vqt_jax.runtime import numerics
from vqt_jax.serving import programs as programs_lib
from vqt_jax.tuned import arguments
from vqt_jax.tuned import bundle
from vqt_jax.tuned import model as model_lib


class Served:
  """Tuned models, ready to answer.

  Attributes:
    programs: of the models by their short names. To be read once per request:
      another thread replaces it.
  """

  def __init__(self, runs: Sequence[str], backbone: str | None = None):
    """Load and compile models.

    Raises:
      UserError: see `model.load`; several have one name, or other backbones.
    """
    self._names = arguments.short_names(runs)
    self._runs = list(dict.fromkeys(runs))
    if len(self._runs) < len(runs):
      raise errors.UserError("Expected different runs, found one twice.")
    self._seen = self._read()
    models = model_lib.load(self._runs, backbone).models.values()
    self.programs = programs_lib.compile_programs(
      dict(zip(self._names, models))
    )
    self._fault = ""

  def _read(self) -> list[bytes]:
    """Contents of each `bundle.json`, with the hash of the weights.

    Those at addresses and those of earlier versions do not change.
    """
    contents = []
    for run in self._runs:
      content = b""
      if not checkpoints.is_address(os.fspath(run)):
        file = bundle.find(run) / bundle.INFO
        content = files.read(file) if files.exists(file) else b""
      contents.append(content)
    return contents

  def refresh(self) -> str:
    """Take up bundles that have changed.

    Returns:
      What there is to say: that they are served, or why the old ones still are.
      It is said once.
    """
    try:
      found = self._read()
      if found == self._seen:
        self._fault = ""
        return ""
      backbone = self.programs.first.backbone
      models = model_lib.load(self._runs, backbone).models.values()
      self.programs = programs_lib.compile_programs(
        dict(zip(self._names, models)), self.programs
      )
    except Exception as e:  # Whatever it is, the old ones are served.
      fault, self._fault = self._fault, files.first_line(e)
      same = fault == self._fault
      return "" if same else f"The models stay as they were. {self._fault}"
    self._seen, self._fault = found, ""
    return "New models are served."

  def watch(
    self, seconds: float, stop: threading.Event, say: Callable[[str], None]
  ) -> None:
    """Refresh at intervals until an event."""
    with numerics.jax_defaults():  # They hold in one thread.
      while not stop.wait(seconds):
        if said := self.refresh():
          say(said)
