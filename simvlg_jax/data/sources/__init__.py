"""Record sources: what a data set's files hold, by index.

A record is `{"image": PNG/JPEG bytes or uint8 (H, W, 3), "caption": str, "references": list[str], "id": str}`.
`caption` is what training sees, `references` are all captions of the picture, what evaluation compares with. A source
for training has one record for each caption; any other one for each picture, and `caption` is the first.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import ml_collections
import numpy as np
from PIL import Image, ImageDraw

from simvlg_jax.data.openmoji import VERSION
from simvlg_jax.data.sources.folder import FolderSource
from simvlg_jax.utils.errors import UserError

PREPARE = "python -m simvlg_jax.data.prepare --data_dir {}"


class Source(Protocol):
    """Random access to records by index, IndexError past the end; read from several threads or processes."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


def _check_split(split: str, splits: tuple[str, ...], name: str) -> None:
    if split not in splits:
        raise UserError(f'the data set "{name}" has no split "{split}"; it has {", ".join(splits)}', status=2)


class OpenMojiSource:
    """OpenMoji pictures and names from the ArrayRecord files that `data.prepare` writes."""

    SPLITS = ("train", "val", "test", "novel")

    def __init__(self, data_dir: str, split: str):
        _check_split(split, self.SPLITS, "openmoji")
        folder = Path(data_dir) / "openmoji" / VERSION
        if not (folder / "dataset_info.json").is_file():
            raise UserError(f"no OpenMoji data in {folder}\nprepare it with: {PREPARE.format(data_dir)}")
        # Late: nothing but this source needs it.
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(folder)
        # Pictures stay PNG bytes: the pipeline decodes, and tolerates damage.
        self._records = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        record = self._records[int(index)]
        caption = record["caption"].decode()
        return {
            "image": record["image"],
            "caption": caption,
            "references": [caption],
            "id": record["id"].decode(),
        }


class SyntheticSource:
    """Coloured shapes drawn on demand, the same on each machine: "a red circle". Needs no files."""

    SPLITS = ("train", "val", "test")
    SIDE = 64  # pixels
    COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "black", "pink")
    SHAPES = ("circle", "square", "triangle", "cross")

    def __init__(self, size: int, split: str):
        _check_split(split, self.SPLITS, "synthetic")
        self._size = size
        self._split = split

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self._size:
            raise IndexError(index)
        rng = np.random.default_rng([self.SPLITS.index(self._split), int(index)])
        colour, shape = str(rng.choice(self.COLOURS)), str(rng.choice(self.SHAPES))
        half = int(rng.integers(self.SIDE // 6, self.SIDE // 3))
        x, y = (int(v) for v in rng.integers(half, self.SIDE - half, size=2))
        box = (x - half, y - half, x + half, y + half)
        picture = Image.new("RGB", (self.SIDE, self.SIDE), "white")
        draw = ImageDraw.Draw(picture)
        if shape == "circle":
            draw.ellipse(box, fill=colour)
        elif shape == "square":
            draw.rectangle(box, fill=colour)
        elif shape == "triangle":
            draw.polygon([(x, y - half), (x - half, y + half), (x + half, y + half)], fill=colour)
        else:
            draw.rectangle((x - half, y - half // 3, x + half, y + half // 3), fill=colour)
            draw.rectangle((x - half // 3, y - half, x + half // 3, y + half), fill=colour)
        caption = f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape}"
        return {
            "image": np.asarray(picture),
            "caption": caption,
            "references": [caption],
            "id": f"{self._split}-{int(index)}",
        }


def _openmoji(config: ml_collections.ConfigDict, split: str, training: bool) -> Source:
    return OpenMojiSource(config.get("dir", "data"), split)


def _folder(config: ml_collections.ConfigDict, split: str, training: bool) -> Source:
    _check_split(split, FolderSource.SPLITS, "folder")
    if not config.get("path"):
        raise UserError('the data set "folder" needs data.path, the folder with pictures and captions.jsonl', status=2)
    outside = config.get("allow_outside", False)
    return FolderSource(config.path, split, training=training, allow_outside=outside)


def _synthetic(config: ml_collections.ConfigDict, split: str, training: bool) -> Source:
    _check_split(split, SyntheticSource.SPLITS, "synthetic")
    return SyntheticSource(config.synthetic_size[split], split)


SOURCES: dict[str, Callable[[ml_collections.ConfigDict, str, bool], Source]] = {
    "openmoji": _openmoji,
    "folder": _folder,
    "synthetic": _synthetic,
}


def load_source(data_config: ml_collections.ConfigDict, split: str, training: bool = False) -> Source:
    """Opens one split of the data set `data_config.name`.

    Args:
      training: for one record for each caption, instead of one for each picture with all its captions as references.

    Raises UserError for an unknown data set or split, and for data that is absent or malformed.
    """
    if data_config.name not in SOURCES:
        raise UserError(f'unknown data set "{data_config.name}"; there are {", ".join(SOURCES)}', status=2)
    return SOURCES[data_config.name](data_config, split, training)


def check_unique_ids(ids: Sequence[str]) -> None:
    """Raises UserError if two records share an id: scores go by id, so one would hide the other."""
    twice = [name for name, count in Counter(ids).items() if count > 1]
    if twice:
        others = f", and so have the pictures of {len(twice) - 1} other ids" if len(twice) > 1 else ""
        raise UserError(
            f"two pictures of this split have the id {twice[0]!r}{others}: scores go by id, so give each picture its "
            "own, and a picture with several captions one record with all of them as references"
        )
