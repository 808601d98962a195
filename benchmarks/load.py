"""Clients of `benchmarks.serving`, in a process of their own.

  python -m benchmarks.load PORT IMAGE CLIENTS SECONDS FAULTY

CLIENTS send the image again and again, and try again when they are told to;
FAULTY others do harm. Prints as JSON the seconds of each answer and of all, how
often clients were told to try again, and the requests that were lost.
"""

import http.client
import itertools
import json
import pathlib
import socket
import struct
import sys
import threading
import time
import zlib

SLOW_SECONDS = 0.1  # Between two bytes.


def main(port: int, file: str, clients: int, seconds: float, faulty: int):
  """Run all clients; return what they saw."""
  image = pathlib.Path(file).read_bytes()
  large = _png(7_000) if faulty else b""
  started = time.monotonic()
  end = started + seconds
  answered, again, lost = [], [], []

  def honest() -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    while (start := time.monotonic()) < end:
      try:
        connection.request("POST", "/predict", image)
        response = connection.getresponse()
        response.read()
      except (OSError, http.client.HTTPException) as e:
        lost.append(repr(e))
        connection.close()
        continue
      if response.status == 200:
        answered.append(time.monotonic() - start)
      elif response.status == 429:
        again.append(1)
        time.sleep(float(response.headers["Retry-After"]))
      else:
        lost.append(response.status)

  def harmful() -> None:
    for do in itertools.cycle((slow, cut, bomb)):
      if time.monotonic() > end:
        return
      with socket.create_connection(("127.0.0.1", port), timeout=120) as wire:
        try:
          do(wire)
        except OSError:
          pass  # Thrown out.

  def slow(wire: socket.socket) -> None:
    wire.sendall(_head(len(image)))
    for byte in image[:100]:
      if time.monotonic() > end:
        return
      wire.sendall(bytes([byte]))
      time.sleep(SLOW_SECONDS)

  def cut(wire: socket.socket) -> None:
    wire.sendall(_head(10_000_000) + bytes(5_000_000))

  def bomb(wire: socket.socket) -> None:
    wire.sendall(_head(len(large)) + large)
    wire.recv(4096)

  threads = [threading.Thread(target=honest) for _ in range(clients)]
  threads += [threading.Thread(target=harmful) for _ in range(faulty)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  taken = time.monotonic() - started
  return {
    "answered": answered,
    "again": len(again),
    "lost": lost,
    "seconds": taken,
  }


def _head(length: int) -> bytes:
  return (
    f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n"
  ).encode()


def _png(side: int) -> bytes:
  """A black PNG of so many pixels, at a thousandth of their bytes."""
  chunk = lambda kind, data: (
    struct.pack(">I", len(data))
    + kind
    + data
    + struct.pack(">I", zlib.crc32(kind + data))
  )
  packed = zlib.compressobj(9)
  row = bytes(1 + 4 * side)
  data = b"".join(packed.compress(row) for _ in range(side)) + packed.flush()
  return (
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 6, 0, 0, 0))
    + chunk(b"IDAT", data)
    + chunk(b"IEND", b"")
  )


if __name__ == "__main__":
  port, file, clients, seconds, faulty = sys.argv[1:]
  found = main(int(port), file, int(clients), float(seconds), int(faulty))
  json.dump(found, sys.stdout)
