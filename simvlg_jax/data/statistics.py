"""Numbers about a source, from a sample of its records, and the speed of a pipeline."""

import io
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from PIL import Image

from simvlg_jax.data import clips, transforms
from simvlg_jax.data.batch import Batch
from simvlg_jax.data.skipped import reason
from simvlg_jax.data.sources import Source
from simvlg_jax.data.text import TextEncoder

SECONDS = 3  # of measuring the speed
MAX_RECORDS = 2000  # that are read for statistics, at equal distances


class Picture(NamedTuple):
    """Of an encoded picture or video: format (of a video the codec), pixels and bytes."""

    format: str
    width: int
    height: int
    bytes: int


@dataclass
class Statistics:
    """What the sampled records of a source are like.

    Attributes:
      records: number of all records of the source.
      sampled: number of records that were read for the rest.
      pictures: of the readable ones.
      references: number of captions or answers of each record.
      questions: number of records with a question.
      tokens: length of each text as the model gets it: prompt, start and end included, truncated.
      dead: records that cannot be used, by `skipped.reason`.
    """

    records: int
    sampled: int
    pictures: list[Picture] = field(default_factory=list)
    references: list[int] = field(default_factory=list)
    questions: int = 0
    tokens: list[int] = field(default_factory=list)
    dead: Counter[str] = field(default_factory=Counter)


def describe(
    source: Source, encoder: TextEncoder, max_records: int = MAX_RECORDS, *, videos: bool = False
) -> Statistics:
    """Reads records at equal distances, and of their pictures or videos the headers only."""
    places = np.unique(np.linspace(0, len(source) - 1, min(len(source), max_records)).astype(int))
    found = Statistics(len(source), len(places))
    for place in places.tolist():
        try:
            record = source[place]
            found.pictures.append((_video if videos else _picture)(record["image"]))
        except transforms.UNREADABLE as error:
            found.dead[reason(error)] += 1
            continue
        found.references.append(len(record["references"]))
        found.questions += "question" in record
        found.tokens.append(len(encoder(record["caption"], record.get("prompt", ""))[0]))
    return found


def _picture(image: bytes | np.ndarray) -> Picture:
    if isinstance(image, np.ndarray):
        return Picture("pixels", image.shape[1], image.shape[0], image.nbytes)
    with Image.open(io.BytesIO(image)) as picture:
        return Picture(picture.format or "", picture.width, picture.height, len(image))


def _video(video: bytes) -> Picture:
    return Picture(*clips.header(video), len(video))


def histogram(values: list[int], bars: int = 32) -> list[tuple[str, int]]:
    """Returns (label, count) of bars of equal width over whole numbers; a bar of several numbers is labelled "8-11"."""
    if not values:
        return []
    low, high = min(values), max(values)
    width = -(-(high - low + 1) // bars)
    counts = Counter((value - low) // width for value in values)
    firsts = [low + i * width for i in range((high - low) // width + 1)]
    return [(f"{first}" if width == 1 else f"{first}-{first + width - 1}", counts[i]) for i, first in enumerate(firsts)]


def batches_per_second(batches: Iterator[Batch]) -> float:
    """Measures the iterator for about SECONDS seconds."""
    next(batches)  # leaves the start-up out
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < SECONDS and next(batches, None) is not None:
        count += 1
    return count / (time.perf_counter() - start)
