"""The server that an application runs in."""

from __future__ import annotations

import socket
from typing import Any

from etils import epy

from vqt_jax import errors

with epy.lazy_imports():
  import uvicorn

_CONNECTIONS = 512


def bind(host: str, port: int) -> socket.socket:
  """Reserve an address; nobody is answered yet.

  Args:
    host: name or address of this machine.
    port: 0: any that is free.

  Raises:
    UserError: the host is unknown or another machine, or the port is taken.
  """
  bound = None
  try:
    kind, _, _, _, address = socket.getaddrinfo(
      host, port, type=socket.SOCK_STREAM
    )[0]
    bound = socket.socket(kind, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(address)
  except (OSError, UnicodeError) as e:
    if bound:
      bound.close()
    reason = getattr(e, "strerror", None) or str(e)
    raise errors.UserError(
      f"Cannot listen on --host {host} --port {port}: {reason}. Name an address"
      " of this machine, and a port that is free (0: any)."
    ) from e
  return bound


def make_server(app: Any, seconds: int) -> uvicorn.Server:
  """Make a server that ends after SIGTERM or SIGINT.

  It answers what has been asked before, for up to so many seconds.
  """
  return uvicorn.Server(
    uvicorn.Config(
      app,
      http="h11",
      loop="asyncio",
      ws="none",
      lifespan="off",
      log_config=None,
      access_log=False,
      server_header=False,
      limit_concurrency=_CONNECTIONS,
      timeout_graceful_shutdown=seconds,
    )
  )
