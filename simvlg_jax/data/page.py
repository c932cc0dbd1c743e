"""A page of HTML that shows a source: its numbers, and samples with their tokens as the model gets them."""

import base64
import io
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
from PIL import Image

from simvlg_jax.data.batch import Batch, BatchSpec
from simvlg_jax.data.statistics import Statistics, histogram
from simvlg_jax.data.text import IGNORE
from simvlg_jax.utils.files import atomic_write

SHOWN = 160  # pixels of the longer side of a shown picture, at least


class Token(NamedTuple):
    """One position of a text. `kind` is "target", "input" (no loss) or "padding" (masked)."""

    text: str
    id: int
    kind: str


class Sample(NamedTuple):
    """One example: its frames as base64 PNG (one for a picture), and its texts by name."""

    frames: list[str]
    texts: dict[str, list[Token]]
    dead: bool


def samples(batch: Batch, spec: BatchSpec) -> list[Sample]:
    """Returns the examples of a batch."""
    rows = len(next(iter(batch.values())))
    weights = batch.get("weight", np.ones(rows))
    return [
        Sample(
            _frames(batch["image"][row]) if "image" in batch else [],
            {name: _tokens(batch, spec, name, row) for name in spec.texts},
            not weights[row],
        )
        for row in range(rows)
    ]


def _frames(image: np.ndarray) -> list[str]:
    """(S, S, 3) or (F, S, S, 3) uint8 -> base64 PNG of each frame, small ones enlarged to whole multiples."""
    encoded = []
    for frame in image if image.ndim == 4 else [image]:
        out = io.BytesIO()
        scale = max(1, SHOWN // max(frame.shape[:2]))
        Image.fromarray(frame.repeat(scale, 0).repeat(scale, 1)).save(out, "PNG")
        encoded.append(base64.b64encode(out.getvalue()).decode())
    return encoded


def _tokens(batch: Batch, spec: BatchSpec, name: str, row: int) -> list[Token]:
    encoder = spec.texts[name].encoder
    ids, mask = batch[f"{name}_ids"][row], batch[f"{name}_mask"][row]
    targets = batch.get(f"{name}_targets", np.full_like(batch[f"{name}_ids"], IGNORE))[row]
    kinds = ["padding" if not m else "target" if t != IGNORE else "input" for m, t in zip(mask, targets, strict=True)]
    return [Token(encoder.token_text(int(i)), int(i), kind) for i, kind in zip(ids, kinds, strict=True)]


def write_page(
    path: Path, title: str, statistics: Statistics, limit: int, shown: list[Sample], speed: str | None
) -> None:
    """Writes a page that needs no other file.

    Args:
      limit: the maximum number of tokens.
      shown: the samples.
      speed: a sentence about the speed of the pipeline.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    pictures = statistics.pictures
    charts = {
        "caption length in tokens": histogram(statistics.tokens),
        "width in pixels": histogram([picture.width for picture in pictures]),
        "height in pixels": histogram([picture.height for picture in pictures]),
        "file size in KiB": histogram([picture.bytes // 1024 for picture in pictures]),
        "answers of a question" if statistics.questions else "captions of a picture": histogram(statistics.references),
    }
    page = environment.get_template("page.html.j2").render(
        title=title,
        statistics=statistics,
        limit=limit,
        full=sum(length == limit for length in statistics.tokens),
        formats=Counter(picture.format for picture in pictures).most_common(),
        charts={name: bars for name, bars in charts.items() if bars},
        samples=shown,
        speed=speed,
    )
    with atomic_write(path) as partial:
        partial.write_text(page, encoding="utf-8")
