"""The web application: a page, and answers as JSON."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Sequence
from concurrent import futures
import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
import re
from typing import Any

from etils import epy
import numpy as np

from vqt_jax.runtime import numerics
from vqt_jax.serving import batcher as batcher_lib
from vqt_jax.serving import limits as limits_lib
from vqt_jax.serving import observing
from vqt_jax.serving import programs as programs_lib
from vqt_jax.serving import served as served_lib
from vqt_jax.serving import uploads as uploads_lib
from vqt_jax.tuned import inputs
from vqt_jax.tuned import model as model_lib

with epy.lazy_imports():
  from starlette import applications
  from starlette import exceptions
  from starlette import requests
  from starlette import responses
  from starlette import routing

_PAGE = pathlib.Path(__file__).parent / "page.html"
_TOP = 5
_BODIES = 8  # Of the largest size, in memory at once.
_AGAIN = {"Retry-After": "1"}


@dataclasses.dataclass(frozen=True)
class _Item:
  """An image for the batcher."""

  programs: programs_lib.Programs
  image: np.ndarray
  look: bool


class App:
  """An ASGI application that answers images with what is served."""

  def __init__(
    self,
    served: served_lib.Served,
    limits: limits_lib.Limits,
    log: Callable[[str], None],
  ):
    """Start the threads.

    Args:
      served: the models.
      limits: of requests.
      log: is called with a line for each request.
    """
    self._served, self._limits = served, limits
    self._images = limits_lib.Budget(limits.queue)
    self._bytes = limits_lib.Budget(_BODIES * limits.request_megabytes * 10**6)
    self._metrics = observing.Metrics(lambda: self._images.used)
    self._batcher = batcher_lib.Batcher(self._answer, inputs.BATCH)
    self._threads = futures.ThreadPoolExecutor(inputs.THREADS)
    route = routing.Route
    self._app = observing.Observed(
      applications.Starlette(
        routes=[
          route("/", self._page),
          route("/predict", self._predict, methods=["POST"]),
          route("/models", self._models),
          route("/health", self._health),
          route("/metrics", self._show_metrics),
        ],
        exception_handlers={
          exceptions.HTTPException: _refuse,
          limits_lib.Overloaded: _refuse_overload,
          requests.ClientDisconnect: _nobody,
          Exception: _fail,
        },
      ),
      self._metrics,
      log,
    )

  async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
    await self._app(scope, receive, send)

  def close(self) -> None:
    """End the threads, after all that was asked is answered."""
    self._threads.shutdown()
    self._batcher.close()

  def _answer(self, items: list[_Item]) -> list[programs_lib.Answer]:
    """Answer a batch; it is of two kinds just after new models came."""
    self._metrics.batch.observe(len(items))
    answers = []
    with numerics.jax_defaults():  # They hold in one thread.
      for programs, group in itertools.groupby(items, lambda x: x.programs):
        images, looks = zip(*((x.image, x.look) for x in group))
        answers += programs.answer(images, looks)
    return answers

  async def _page(self, request: requests.Request) -> Any:
    del request
    text, policy = _read_page()
    headers = {
      "Content-Security-Policy": policy,
      "X-Content-Type-Options": "nosniff",
      "Referrer-Policy": "no-referrer",
    }
    return responses.HTMLResponse(text, headers=headers)

  async def _health(self, request: requests.Request) -> Any:
    del request
    return _json({"status": "ready"})

  async def _show_metrics(self, request: requests.Request) -> Any:
    del request
    return responses.Response(
      self._metrics.text(), media_type="text/plain; version=0.0.4"
    )

  async def _models(self, request: requests.Request) -> Any:
    del request
    models = self._served.programs.models
    return _json({"models": [_describe(*each) for each in models.items()]})

  async def _predict(self, request: requests.Request) -> Any:
    top = request.query_params.get("top", str(_TOP))
    if not re.fullmatch("[1-9][0-9]{0,5}", top):
      raise uploads_lib.refusal(400, "top: expected a number from 1 on.")
    look = request.query_params.get("attention", "0")
    if look not in ("0", "1"):
      raise uploads_lib.refusal(400, "attention: expected 0 or 1.")
    programs, received = self._served.programs, False
    with self._bytes.share() as take_bytes, self._images.share() as take_images:
      try:
        async with asyncio.timeout(self._limits.seconds):
          uploads = await uploads_lib.receive(request, self._limits, take_bytes)
          received = True
          take_images(len(uploads))
          images = await self._prepare(programs, uploads)
          jobs = [
            self._batcher.submit(_Item(programs, image, look == "1"))
            for image in images
          ]
          answers = await asyncio.gather(*map(asyncio.wrap_future, jobs))
      except TimeoutError:
        seconds = self._limits.seconds
        if not received:
          raise uploads_lib.refusal(
            408, f"The request was not complete after {seconds} s."
          ) from None
        raise exceptions.HTTPException(
          503, f"There was no answer within {seconds} s.", _AGAIN
        ) from None
    predictions = [
      {"image": upload.name, "models": _say(programs, answer, int(top))}
      for upload, answer in zip(uploads, answers)
    ]
    return _json({"predictions": predictions})

  async def _prepare(
    self,
    programs: programs_lib.Programs,
    uploads: Sequence[uploads_lib.Upload],
  ) -> list[np.ndarray]:
    """Decode images in threads; raise the first error after all are done."""
    prepare = functools.partial(
      uploads_lib.prepare,
      prepare_image=programs.first.prepare,
      megapixels=self._limits.megapixels,
    )
    loop = asyncio.get_running_loop()
    jobs = [loop.run_in_executor(self._threads, prepare, x) for x in uploads]
    results = await asyncio.gather(*jobs, return_exceptions=True)
    for result in results:
      if isinstance(result, BaseException):
        raise result
    return results


def _describe(name: str, model: model_lib.Model) -> dict[str, Any]:
  """Describe a model, for those who ask and for the page."""
  info = model.info
  return {
    "name": name,
    "task": info["task"],
    "method": model.tuner.method,
    "has_attention": model.tuner.has_queries,
    "seeds": model.num_seeds,
    "test_accuracy": info["results"].get("test_accuracy", {}).get("mean"),
    "image_size": model.backbone.config.image_size,
    "fit": info["preprocessing"].get("fit", "squash"),
    "classes": model.classes,
  }


def _say(
  programs: programs_lib.Programs, answer: programs_lib.Answer, top: int
) -> dict[str, Any]:
  """Return an answer as JSON has it, by model."""
  said = {}
  for name, model in programs.models.items():
    best = model_lib.best(answer.probabilities[name], model.classes, top)
    said[name] = {"top": [{"label": x, "probability": p} for x, p in best]}
    if answer.attention and name in answer.attention:
      said[name]["attention"] = (
        answer.attention[name].astype(float).round(3).tolist()
      )
  return said


def _json(
  content: Any, status: int = 200, headers: dict[str, str] | None = None
) -> Any:
  return responses.Response(
    json.dumps(content, allow_nan=False),
    status,
    {"X-Content-Type-Options": "nosniff", **(headers or {})},
    "application/json",
  )


async def _refuse(request: Any, error: Any) -> Any:
  del request
  return _json({"error": error.detail}, error.status_code, error.headers)


async def _refuse_overload(request: Any, error: Any) -> Any:
  del request, error
  message = "The server is busy; try again."
  return _json({"error": message}, 429, _AGAIN)


async def _nobody(request: Any, error: Any) -> Any:
  """Answer a client that left before it had sent all; 499 as nginx has it."""
  del request, error
  return responses.Response(status_code=499)


async def _fail(request: Any, error: Any) -> Any:
  del request, error
  message = "The server failed; its log has more."
  return _json({"error": message}, 500)


@functools.cache
def _read_page() -> tuple[str, str]:
  """Return the page, and the policy that lets only what is in it run."""
  text = _PAGE.read_text(encoding="utf-8")
  sources = []
  for tag in ("style", "script"):
    content = re.search(f"<{tag}>(.*?)</{tag}>", text, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(content.encode()).digest())
    sources.append(f"{tag}-src 'sha256-{digest.decode()}'")
  policy = "; ".join(
    [
      "default-src 'none'",
      *sources,
      "img-src 'self' blob: data:",
      "connect-src 'self'",
      "base-uri 'none'",
      "form-action 'none'",
      "frame-ancestors 'none'",
    ]
  )
  return text, policy
