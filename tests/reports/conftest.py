import pytest


@pytest.fixture(autouse=True)
def drawn(pictures):
  """Here pictures are looked at."""
