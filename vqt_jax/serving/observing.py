"""Metrics of a server, and a log line for each request."""

from __future__ import annotations

from collections.abc import Callable
import time
from typing import Any

from etils import epy

from vqt_jax.serving import programs

with epy.lazy_imports():
  import prometheus_client

_PROBES = ("/health", "/metrics")  # Asked all the time.


class Metrics:
  """Counts and durations, in the format of Prometheus."""

  def __init__(self, waiting: Callable[[], float]):
    """Begin to count.

    Args:
      waiting: returns the number of images that are not answered yet.
    """
    self.registry = prometheus_client.CollectorRegistry()
    prometheus_client.ProcessCollector(registry=self.registry)
    self.requests = prometheus_client.Counter(
      "vqt_jax_requests",
      "Requests by status; 499: the client left; 0: no answer.",
      ["status"],
      registry=self.registry,
    )
    self.seconds = prometheus_client.Histogram(
      "vqt_jax_request_seconds",
      "Time from a request to its answer.",
      registry=self.registry,
    )
    self.batch = prometheus_client.Histogram(
      "vqt_jax_batch_images",
      "Images that were answered in one pass.",
      buckets=programs.SIZES,
      registry=self.registry,
    )
    prometheus_client.Gauge(
      "vqt_jax_images_waiting",
      "Images that are decoded or wait for the backbone.",
      registry=self.registry,
    ).set_function(waiting)

  def text(self) -> bytes:
    return prometheus_client.generate_latest(self.registry)


class Observed:
  """An ASGI application, counted and logged."""

  def __init__(self, app: Any, metrics: Metrics, log: Callable[[str], None]):
    self._app, self._metrics, self._log = app, metrics, log

  async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
    status, started = 0, time.monotonic()

    async def watched(message: Any) -> None:
      nonlocal status
      status = message.get("status", status)
      await send(message)

    try:
      await self._app(scope, receive, watched)
    finally:
      if scope["path"] not in _PROBES:
        seconds = time.monotonic() - started
        self._metrics.requests.labels(status).inc()
        self._metrics.seconds.observe(seconds)
        host, _ = scope.get("client") or ("-", 0)
        asked = f"{scope['method']} {scope['raw_path'].decode('ascii')}"
        clock = time.strftime("%H:%M:%S")
        self._log(f"{clock}  {host}  {asked}  {status}  {seconds:.3f} s")
