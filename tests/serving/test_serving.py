"""A server for tuned models, over HTTP: right answers, and what is refused."""

import base64
import concurrent.futures
import contextlib
import dataclasses
import http.client
import io
import json
import re
import socket
import struct
import threading
import time
import types
import zlib

import jax
import numpy as np
import PIL.Image
import pytest

from tests import helpers
import vqt_jax
from vqt_jax.serving import app as app_lib
from vqt_jax.serving import limits as limits_lib
from vqt_jax.serving import programs
from vqt_jax.serving import served as served_lib
from vqt_jax.serving import server as server_lib

CLASSES = ("blue", "<b>a,b</b>", "größer")
LIMITS = limits_lib.Limits(
  images=3, image_megabytes=1, request_megabytes=2, megapixels=1, queue=5
)
METHODS = ("vqt", "linear", "vqt+lora")


def write_model(folder, method, seed=0, depth=2):
  """Write a bundle, and its backbone beside it."""
  backbone = helpers.tiny_backbone(depth=depth)
  source = folder.parent / f"vit{depth}.npz"
  if not source.exists():
    folder.parent.mkdir(exist_ok=True)
    vqt_jax.save_npz(source, backbone)
  tuner = vqt_jax.make_tuner(method, backbone, len(CLASSES), num_queries=2)
  seeds = [
    tuner.init(jax.random.key(seed + i), backbone.params) for i in range(2)
  ]
  model = helpers.tuned_model(backbone, tuner, *seeds)
  del model.info["preprocessing"]["resize"]
  model.info["preprocessing"]["fit"] = "squash"
  helpers.write_bundle(folder, source, model, classes=list(CLASSES))


@pytest.fixture(scope="module", autouse=True)
def few_batch_sizes():
  with helpers.few_batch_sizes():
    yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  place = tmp_path_factory.mktemp("place")
  for method in METHODS:
    write_model(place / method, method)
  return place


@contextlib.contextmanager
def started(runs, limits=LIMITS):
  """A server in a thread: its port, application, log and end."""
  log = []
  served = served_lib.Served(list(map(str, runs)))
  app = app_lib.App(served, limits, log.append)
  with server_lib.bind("127.0.0.1", 0) as bound:
    server = server_lib.make_server(app, 9)
    thread = threading.Thread(target=server.run, args=([bound],))
    thread.start()
    while not server.started:
      time.sleep(0.01)
    port = bound.getsockname()[1]
    try:
      yield types.SimpleNamespace(
        port=port, app=app, server=server, thread=thread, log=log
      )
    finally:
      server.should_exit = True
      thread.join()
      app.close()


@pytest.fixture(scope="module")
def site(place):
  with started([place / method for method in METHODS]) as site:
    yield site


def ask(site, path, body=None, **headers):
  """Status, headers and content of an answer."""
  connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=60)
  headers = {k.replace("_", "-"): v for k, v in headers.items()}
  connection.request("GET" if body is None else "POST", path, body, headers)
  response = connection.getresponse()
  content = response.read()
  connection.close()
  if response.headers["Content-Type"] == "application/json":
    content = json.loads(content)
  return response.status, response.headers, content


def form(*files):
  """Body and type of a form of (name, content)."""
  parts = [
    f'--cut\r\nContent-Disposition: form-data; name="file"; filename="{name}"'
    "\r\n\r\n".encode()
    + content
    + b"\r\n"
    for name, content in files
  ]
  return b"".join([*parts, b"--cut--\r\n"]), {
    "Content_Type": "multipart/form-data; boundary=cut"
  }


def as_json(*contents):
  images = [base64.b64encode(content).decode() for content in contents]
  return json.dumps({"images": images}), {"Content_Type": "application/json"}


def encoded(kind="PNG", mode="RGB", size=(20, 14), seed=0):
  rng = np.random.default_rng(seed)
  if mode == "I;16":
    pixels = rng.integers(0, 2**16, size[::-1], np.uint16)
    image = PIL.Image.fromarray(pixels)
  else:
    shape = (*size[::-1], len(PIL.Image.new(mode, (1, 1)).getbands()))
    pixels = rng.integers(0, 255, shape, np.uint8)
    image = PIL.Image.frombytes(mode, size, pixels.tobytes())
  out = io.BytesIO()
  image.save(out, kind)
  return out.getvalue()


IMAGE = encoded()


def bomb(side):
  """A PNG that says it has so many pixels, and has none."""
  chunk = lambda kind, data: (
    struct.pack(">I", len(data))
    + kind
    + data
    + struct.pack(">I", zlib.crc32(kind + data))
  )
  header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
  return (
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", header)
    + chunk(b"IDAT", zlib.compress(b""))
    + chunk(b"IEND", b"")
  )


def check_answers(place, contents, predictions):
  """They are those of `predict`, of all models."""
  paths = [str(place / method) for method in METHODS]
  expected = vqt_jax.load(paths).predict_proba(contents)
  assert len(predictions) == len(contents)
  for i, each in enumerate(predictions):
    assert list(each["models"]) == list(METHODS)
    for method, path in zip(METHODS, paths):
      top = each["models"][method]["top"]
      order = np.argsort(-expected[path][i])
      assert [x["label"] for x in top] == [CLASSES[k] for k in order]
      helpers.assert_close(
        [x["probability"] for x in top], expected[path][i][order]
      )


@pytest.mark.parametrize("kind, mode", [("JPEG", "CMYK"), ("PNG", "I;16")])
def test_answers_are_those_of_predict(site, place, kind, mode):
  content = encoded(kind, mode)
  status, headers, found = ask(site, "/predict", content)
  assert status == 200 and headers["X-Content-Type-Options"] == "nosniff"
  check_answers(place, [content], found["predictions"])


def test_a_form_and_json_of_several_images(site, place):
  contents = [encoded(seed=i, size=(9 + i, 30)) for i in range(3)]
  names = ["größe.png", "<img src=x>.png", "c.png"]
  body, headers = form(*zip(names, contents))
  status, _, found = ask(site, "/predict", body, **headers)
  assert status == 200
  assert [x["image"] for x in found["predictions"]] == names
  check_answers(place, contents, found["predictions"])
  body, headers = as_json(*contents)
  _, _, again = ask(site, "/predict?top=1", body, **headers)
  for a, b in zip(found["predictions"], again["predictions"], strict=True):
    for method in METHODS:
      assert len(b["models"][method]["top"]) == 1
      assert (
        a["models"][method]["top"][0]["label"]
        == b["models"][method]["top"][0]["label"]
      )


def test_attention_is_that_of_the_queries(site, place):
  status, _, found = ask(site, "/predict?attention=1", IMAGE)
  assert status == 200
  answers = found["predictions"][0]["models"]
  assert "attention" not in answers["linear"]
  for method in ("vqt", "vqt+lora"):
    model = vqt_jax.load(place / method)
    c = model.backbone.config
    weights = model.attention(IMAGE)[:, :, 0].mean(axis=(0, 2, 3))
    patches = weights[:, c.num_prefix_tokens :]
    ratio = patches / patches.mean(axis=1, keepdims=True)
    expected = ratio.reshape(c.depth, *c.grid)
    helpers.assert_close(answers[method]["attention"], expected, 1e-3)


PREDICT = "/predict"


@pytest.mark.parametrize(
  "path, body, headers, status, words",
  [
    (PREDICT, b"", {}, 400, "image is empty, 0 bytes"),
    (PREDICT, b"hello", {}, 400, "not an image of a kind that is read here"),
    (PREDICT, encoded("EPS"), {}, 400, "not an image of a kind"),
    (PREDICT, IMAGE[:200], {}, 400, "Cannot use image image: .*truncated"),
    (PREDICT, bomb(1001), {}, 413, "more than 1 million pixels"),
    (PREDICT, bomb(60_000), {}, 413, "more than 1 million pixels"),
    (PREDICT, bytes(1_000_001), {}, 413, "1,000,001 bytes; up to 1 MB"),
    (PREDICT, bytes(2_000_001), {}, 413, "A request may have up to 2 MB"),
    (PREDICT, *form(*4 * [("a", IMAGE)]), 413, "at most 3 images .* found 4"),
    (PREDICT, *form(*9 * [("a", IMAGE)]), 400, "The form is damaged: Too many"),
    (PREDICT, *form(("a\u0001b", b"x")), 400, r"^a\\x01b is not an image"),
    (PREDICT, *form(), 400, "Expected an image, found none"),
    (PREDICT, form(("a", IMAGE))[0][:-9], form()[1], 400, "It has no end"),
    (PREDICT, b"--", {"Content_Type": "multipart/form-data"}, 400, "boundary"),
    (PREDICT, *as_json(*4 * [IMAGE]), 413, "at most 3 images"),
    (PREDICT, *as_json(), 400, "Expected an image, found none"),
    (PREDICT, b'{"images": ["?"]}', as_json()[1], 400, "1 is not in base64"),
    (PREDICT, b'{"images": "a"}', as_json()[1], 400, "Expected JSON"),
    (PREDICT, b"[" * 10**5, as_json()[1], 400, "Expected JSON"),
    (PREDICT + "?top=0", IMAGE, {}, 400, "top: expected a number"),
    (PREDICT + "?attention=yes", IMAGE, {}, 400, "attention: expected 0 or 1"),
    (PREDICT, None, {}, 405, "Method Not Allowed"),
    ("/none", None, {}, 404, "Not Found"),
  ],
)
def test_bad_requests(site, path, body, headers, status, words):
  found, _, content = ask(site, path, body, **headers)
  assert (found, list(content)) == (status, ["error"])
  assert re.search(words, content["error"]), content
  assert site.app._bytes.used == site.app._images.used == 0


def send(site, head, body):
  """A connection on which a part of a request is sent."""
  connection = socket.create_connection(("127.0.0.1", site.port), timeout=60)
  lines = [f"POST {PREDICT} HTTP/1.1", "Host: x", head, "", ""]
  connection.sendall("\r\n".join(lines).encode() + body)
  return connection


def wait_until(true):
  for _ in range(2000):
    if true():
      return
    time.sleep(0.01)
  raise AssertionError("waited in vain")


def test_uploads_that_are_cut(site):
  for _ in range(3):
    send(site, "Content-Length: 1000000", IMAGE).close()
  wait_until(lambda: sum("  499  " in line for line in site.log) == 3)
  assert site.app._bytes.used == 0
  assert ask(site, PREDICT, IMAGE)[0] == 200


def test_uploads_that_do_not_end(site, monkeypatch):
  limits = dataclasses.replace(LIMITS, seconds=0.01)
  monkeypatch.setattr(site.app, "_limits", limits)
  with send(site, "Content-Length: 1000", IMAGE[:9]) as connection:
    assert b" 408 " in connection.recv(99).partition(b"\r\n")[0]
  monkeypatch.undo()
  chunks = b"".join(b"ffff\r\n%s\r\n" % bytes(0xFFFF) for _ in range(31))
  with send(site, "Transfer-Encoding: chunked", chunks) as connection:
    assert b" 413 " in connection.recv(99).partition(b"\r\n")[0]


@pytest.fixture
def hold(monkeypatch):
  """Function after which answers wait for the event that it returns.

  Its `sizes` are those of the batches.
  """
  gate, answer = threading.Event(), programs.Programs.answer
  gate.sizes = []

  def held(self, images, looks):
    gate.sizes.append(len(images))
    assert gate.wait(60)
    return answer(self, images, looks)

  def hold():
    monkeypatch.setattr(programs.Programs, "answer", held)
    return gate

  yield hold
  gate.set()


def test_concurrent_requests_share_a_batch_and_too_many_are_refused(
  site, place, hold
):
  gate = hold()
  contents = [encoded(seed=i) for i in range(LIMITS.queue)]
  with concurrent.futures.ThreadPoolExecutor(LIMITS.queue) as threads:
    answers = [threads.submit(ask, site, PREDICT, contents[0])]
    wait_until(lambda: gate.sizes)
    answers += [threads.submit(ask, site, PREDICT, x) for x in contents[1:]]
    wait_until(lambda: site.app._batcher._queue.qsize() == LIMITS.queue - 1)
    status, headers, said = ask(site, PREDICT, IMAGE)
    assert (status, headers["Retry-After"]) == (429, "1")
    assert said == {"error": "The server is busy; try again."}
    gate.set()
    found = [answer.result() for answer in answers]
  assert {status for status, *_ in found} == {200}
  assert gate.sizes == [1, LIMITS.queue - 1]
  check_answers(place, contents, [x["predictions"][0] for *_, x in found])


def test_no_answer_in_time(site, hold, monkeypatch):
  hold()
  limits = dataclasses.replace(LIMITS, seconds=0.1)
  monkeypatch.setattr(site.app, "_limits", limits)
  status, headers, said = ask(site, PREDICT, IMAGE)
  assert (status, headers["Retry-After"]) == (503, "1")
  assert "no answer within 0.1 s" in said["error"]


def test_a_failure_is_said_and_survived(site, monkeypatch):
  def fail(*args):
    raise RuntimeError("device lost")

  with monkeypatch.context() as patch:
    patch.setattr(programs.Programs, "answer", fail)
    status, _, said = ask(site, PREDICT, IMAGE)
  assert (status, said) == (
    500,
    {"error": "The server failed; its log has more."},
  )
  assert ask(site, PREDICT, IMAGE)[0] == 200


def test_what_has_been_asked_is_answered_at_the_end(place, hold):
  with (
    concurrent.futures.ThreadPoolExecutor() as threads,
    started([place / "linear"]) as site,
  ):
    gate = hold()
    answer = threads.submit(ask, site, PREDICT, IMAGE)
    wait_until(lambda: gate.sizes)
    site.server.should_exit = True
    gate.set()
    assert answer.result()[0] == 200
    site.thread.join(60)
    with pytest.raises(ConnectionError):
      ask(site, "/health")


def test_new_bundles_are_taken_up(tmp_path):
  run = tmp_path / "run"
  write_model(run / "tuned", "linear")
  served = served_lib.Served([str(run)])
  first = served.programs
  assert served.refresh() == "" and served.programs is first
  write_model(run / "tuned", "linear", seed=1)
  assert served.refresh() == "New models are served."
  second = served.programs
  image = second.first.prepare(IMAGE)
  (found,) = second.answer([image], [False])
  expected = vqt_jax.load(run).predict_proba(IMAGE)[0]
  helpers.assert_close(found.probabilities["run"], expected)
  write_model(run / "tuned", "vqt")
  assert served.refresh() and served.programs.first.tuner.method == "vqt"


def test_old_models_stay_if_new_ones_cannot_be_used(tmp_path):
  run = tmp_path / "run"
  write_model(run, "linear")
  served = served_lib.Served([str(run)])
  before, info = served.programs, (run / "bundle.json").read_text()
  for change, words in (
    (lambda: (run / "bundle.json").write_text("{"), "Cannot read"),
    (lambda: (run / "bundle.json").unlink(), "holds no tuned model"),
    (lambda: write_model(run, "linear", depth=1), "other weights"),
  ):
    change()
    assert re.search(f"stay as they were.*{words}", served.refresh())
    assert served.refresh() == "" and served.programs is before
  write_model(run, "linear")
  assert (run / "bundle.json").read_text() == info
  assert served.refresh() == "" and served.programs is before


def test_models_health_and_metrics(site):
  assert ask(site, "/health")[2] == {"status": "ready"}
  models = ask(site, "/models")[2]["models"]
  assert [x["name"] for x in models] == list(METHODS)
  assert models[0]["classes"] == list(CLASSES) and models[0]["seeds"] == 2
  assert [x["has_attention"] for x in models] == [True, False, True]
  ask(site, "/predict?top=2%0A", IMAGE)
  status, _, text = ask(site, "/metrics")
  assert status == 200 and b'vqt_jax_requests_total{status="400"}' in text
  assert b"vqt_jax_images_waiting 0.0" in text
  line = r"[\d:]{8}  127.0.0.1  POST /predict  400  \d+\.\d{3} s"
  wait_until(lambda: re.fullmatch(line, site.log[-1]))


def test_the_page_runs_its_own_script_only(site):
  status, headers, page = ask(site, "/")
  policy, page = headers["Content-Security-Policy"], page.decode()
  assert status == 200 and policy.startswith("default-src 'none'; style-src '")
  assert "unsafe" not in policy and page.count("<script") == 1
  # Names are never taken for HTML, and nothing is fetched from elsewhere.
  assert not re.search("innerHTML|insertAdjacent|document.write|//[a-z]", page)
