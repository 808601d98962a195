"""Bytes and seconds as text."""

import datetime


def format_bytes(count: float) -> str:
  """Format a number of bytes in GiB, MiB or KiB."""
  for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
    if count >= size:
      return f"{count / size:,.1f} {unit}"
  return f"{count / 2**10:,.1f} KiB"


def format_mib(count: float | None, digits: int = 1) -> str:
  """Format bytes as a bare number of MiB, for a column; "" if unknown."""
  return "" if count is None else f"{count / 2**20:,.{digits}f}"


def format_count(count: int, noun: str) -> str:
  """Format e.g. "1 epoch", "20 epochs"."""
  return f"{count:,} {noun}" + "s" * (count != 1)


def format_seconds(seconds: float) -> str:
  """Format a duration as H:MM:SS."""
  return str(datetime.timedelta(seconds=round(seconds)))
