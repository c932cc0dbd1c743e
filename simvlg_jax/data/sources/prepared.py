"""What `python -m simvlg_jax.data.prepare` wrote: an index, and pictures or videos in ArrayRecord files or tars."""

import itertools
import os
from typing import Protocol

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from simvlg_jax.data.index import Index, Row
from simvlg_jax.data.read_ahead import read_ahead
from simvlg_jax.data.sources.array_record import read_record
from simvlg_jax.data.sources.source import Record, RecordInfo
from simvlg_jax.data.tars import TarReader
from simvlg_jax.utils.errors import UserError


class Reader(Protocol):
    """Reads the encoded pictures or videos of an index's rows."""

    def read(self, number: int, row: Row) -> bytes: ...

    def read_ahead(self, start: int, stop: int) -> None: ...


class Tars:
    """The pictures are in the user's tars."""

    def __init__(self, index: Index):
        self._index, self._tars = index, TarReader(index.tars)

    def read(self, number: int, row: Row) -> bytes:
        del number
        return self._tars.read(row)

    def read_ahead(self, start: int, stop: int) -> None:
        self._tars.read_ahead(self._index[start], self._index[stop - 1])


class Shards:
    """The pictures are in ArrayRecord files, in the order of the index."""

    def __init__(self, folder: epath.Path, split: str, index: Index):
        # Late: sources without ArrayRecord files do not need it.
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(folder)
        if split not in builder.info.splits or builder.info.splits[split].num_examples != len(index):
            raise UserError(f"{folder}: the index of {split} does not fit its ArrayRecord files; prepare it again")
        info = builder.info.splits[split]
        self._files = [os.fspath(path) for path in info.filepaths]
        self._starts = [0, *itertools.accumulate(info.shard_lengths)]
        self._key = index.media
        decoders = {"image": tfds.decode.SkipDecoding()} if index.media == "image" else None
        self._records = builder.as_data_source(split, decoders=decoders)

    def read(self, number: int, row: Row) -> bytes:
        record = read_record(self._records, number)
        if record["id"].decode() != row.id:
            raise UserError(f"record {number} is {record['id'].decode()!r}, in the index {row.id!r}; prepare it again")
        return record[self._key]

    def read_ahead(self, start: int, stop: int) -> None:
        """The place of a record within a file is estimated from its number."""
        for path, first, end in zip(self._files, self._starts, self._starts[1:], strict=False):
            low, high = max(start, first), min(stop, end)
            if low < high and os.path.exists(path):
                scale = os.path.getsize(path) / (end - first)
                read_ahead(path, int((low - first) * scale), int((high - first) * scale) + 1)


class PreparedSource:
    """Reads a split of the folder `data.path`.

    For training, a record with several captions is as many records. A record with a question is always one.

    Raises UserError if the split was not prepared, if its files do not fit each other, or if it holds videos and
    `data.frames` is 0, or pictures and it is not.
    """

    SPLITS = ()
    TEST_SPLITS = ("test",)

    def __init__(self, data_config: ConfigDict, split: str, training: bool = False):
        if not data_config.path:
            raise UserError('the data set "prepared" needs data.path, the folder that `prepare` wrote', status=2)
        folder = epath.Path(data_config.path)
        path = folder / f"index-{split}.arrow"
        if not path.exists():
            there = sorted(other.name[len("index-") : -len(".arrow")] for other in folder.glob("index-*.arrow"))
            has = f"it has {', '.join(there)}" if there else "it has none"
            raise UserError(
                f'{folder} has no prepared split "{split}" ({has}); write it with: '
                f"python -m simvlg_jax.data.prepare --source ... --output {folder} --split {split}"
            )
        self._index = Index(path)
        if (self._index.media == "video") != bool(data_config.get("frames", 0)):
            fix = "set data.frames, the frames of a clip" if self._index.media == "video" else "leave data.frames at 0"
            raise UserError(f"{folder} holds {self._index.media}s: {fix}", 2)
        self._reader: Reader = Tars(self._index) if self._index.tars else Shards(folder, split, self._index)
        self._ends = None  # number of the record after each row's last one, if rows have several records
        if training and not self._index.has_questions:
            counts = self._index.counts()
            if (counts != 1).any():
                self._ends = np.cumsum(counts, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._index) if self._ends is None else int(self._ends[-1])

    def _place(self, index: int) -> tuple[int, int]:
        """Number of a record's row, and which of the row's texts is the caption."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        if self._ends is None:
            return index, 0
        row = int(np.searchsorted(self._ends, index, side="right"))
        return row, index - int(self._ends[row - 1] if row else 0)

    def info(self, index: int) -> RecordInfo:
        row = self._index[self._place(index)[0]]
        return RecordInfo(row.id, row.texts, row.question, row.extras)

    def __getitem__(self, index: int) -> Record:
        number, text = self._place(int(index))
        row = self._index[number]
        record: Record = {
            "image": self._reader.read(number, row),
            "caption": row.texts[text] if row.texts else "",
            "references": row.texts,
            "id": row.id,
        }
        return record if row.question is None else {**record, "question": row.question}

    def prefetch(self, start: int, stop: int) -> None:
        """Starts to read the files of records [start, stop) into the page cache, in one sweep."""
        if start < stop:
            self._reader.read_ahead(self._place(start)[0], self._place(stop - 1)[0] + 1)
