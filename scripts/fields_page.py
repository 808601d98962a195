"""Write docs/fields.md from the table of all fields.

python -m scripts.fields_page
"""

import pathlib

from vqt_jax.config import fields

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "fields.md"


def text() -> str:
  """Return the contents of the page."""
  return f"""# Config fields

All fields with their defaults, as `python main.py --help` prints them. This
page is made from `config/fields.py`: `python -m scripts.fields_page`.

```text
{fields.describe()}
```
"""


if __name__ == "__main__":
  PAGE.write_text(text())
