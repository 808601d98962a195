"""The model card of a bundle, README.md."""

from collections.abc import Mapping
import re
from typing import Any

from vqt_jax import accuracy

_MOST_CLASSES = 100

_CARD = """---
library_name: vqt_jax
pipeline_tag: image-classification
tags: [visual-query-tuning, vision-transformer]
---

# {title}

A classifier of images into {count} classes, trained on a frozen Vision
Transformer with {program}. This folder holds what was trained, of {seeds}.
It needs the backbone `{source}`, which is not in here.

```python
import vqt_jax

model = vqt_jax.load("this/folder")  # or, backbone="where {source} is"
model.predict(["image.jpg"])
```

| | |
| --- | --- |
| test accuracy, % | {accuracy} |
| setting | {setting} |
| images | {images} |
| backbone | ViT-{variant} `{source}`, SHA-256 of its weights {sha256} |
| classes | {classes} |
"""


def model_card(info: Mapping[str, Any]) -> str:
  """Return the model card of a bundle in Markdown.

  Args:
    info: contents of its `bundle.json`.
  """
  backbone, preprocessing = info["backbone"], info["preprocessing"]
  classes, seeds = info["classes"], info["seeds"]
  listed = ", ".join(classes[:_MOST_CLASSES])
  if len(classes) > _MOST_CLASSES:
    listed += f" and {len(classes) - _MOST_CLASSES} more"
  size = "x".join(map(str, preprocessing["image_size"]))
  how = preprocessing.get("fit") or preprocessing.get("resize")
  return _CARD.format(
    title=_cell(
      f"{info['task']}: {info['tuner']['method']} on ViT-{backbone['variant']}"
    ),
    count=len(classes),
    program=info["program"],
    seeds=f"{len(seeds)} seed{'s' * (len(seeds) > 1)}",
    source=" ".join(backbone["source"].replace("`", "'").split()),
    accuracy=_accuracy(info["results"]),
    setting=_setting(info["results"].get("chosen", {})),
    images=f"{size} px ({how}), scaled to {preprocessing['value_range']}",
    variant=backbone["variant"],
    sha256=backbone["sha256"],
    classes=_cell(listed),
  )


def _accuracy(results: Mapping[str, Any]) -> str:
  if "test_accuracy" not in results:
    return "not tested"
  test, together = results["test_accuracy"], ""
  if ensemble := results.get("test_ensemble_accuracy"):
    together = f"; the seeds together {100 * ensemble['mean']:.2f}"
  return (
    f"{accuracy.format_mean(test, sign='±')} ({accuracy.over_seeds([test])});"
    f" {test['images']:,} images, 95 % interval"
    f" {accuracy.format_interval(test)}{together}"
  )


def _setting(chosen: Mapping[str, Any]) -> str:
  numbers = {k: x for k, x in chosen.items() if isinstance(x, int | float)}
  text = lambda x: str(x).lower() if isinstance(x, bool) else f"{x:g}"
  return ", ".join(
    f"{k.replace('_', ' ')} {text(x)}" for k, x in numbers.items()
  )


def _cell(text: str) -> str:
  """Escape text from elsewhere for one line of Markdown."""
  return re.sub(r"([\\|`<>\[\]*_#])", r"\\\1", " ".join(text.split()))
