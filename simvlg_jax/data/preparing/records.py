"""The records of a prepared split as TFDS reads them: features, serialisation, names and metadata."""

import os
import re
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from etils import epath
from tensorflow_datasets.core import dataset_info, example_serializer

from simvlg_jax.utils.errors import UserError, first_line

SUFFIX = "array_record"
# Random access needs one record for each group. Encoded pictures do not get smaller by compression.
WRITER = "group_size:1,uncompressed"
VERSION = "1.0.0"
FEATURES, INFO = "features.json", "dataset_info.json"


def features(media: str, questions: bool) -> tfds.features.FeaturesDict:
    """Features of captions or questions about pictures or videos.

    A video is a scalar of bytes, as TFDS stores a text.
    """
    text = tfds.features.Text
    picture = tfds.features.Image(shape=(None, None, 3)) if media == "image" else tfds.features.Scalar(dtype=np.object_)
    texts = (
        {"question": text(), "answers": tfds.features.Sequence(text())}
        if questions
        else {"captions": tfds.features.Sequence(text())}
    )
    return tfds.features.FeaturesDict({"id": text(), media: picture, **texts})


def name_of(folder: str) -> str:
    """A name for TFDS that is made of the folder's."""
    name = re.sub(r"[^a-z0-9]+", "_", os.path.basename(folder.rstrip("/")).lower()).strip("_")
    return name if re.match(r"[a-z]", name) else f"data_{name}".rstrip("_")


def template(folder: str, name: str, split: str) -> tfds.core.ShardedFileTemplate:
    return tfds.core.ShardedFileTemplate(
        data_dir=epath.Path(folder), dataset_name=name, split=split, filetype_suffix=SUFFIX
    )


class Writer:
    """Writes the records of one shard to a local file.

    Raises UserError if the file cannot be written, for example since the disk is full.
    """

    def __init__(self, path: Path, media: str, questions: bool):
        self._features = features(media, questions)
        self._serializer = example_serializer.ExampleSerializer(self._features.get_serialized_info())
        self._path, self._media, self._questions = path, media, questions
        self.bytes = 0
        self._writer = self._call(array_record_module.ArrayRecordWriter, os.fspath(path), WRITER)

    def _call(self, function, *arguments):
        try:
            return function(*arguments)
        except (RuntimeError, ValueError, OSError) as error:
            full = "no space left" in str(error).lower()
            problem = "no space left on device" if full else first_line(error)[:300]
            raise UserError(
                f"cannot write to {self._path.parent.parent} ({problem}): make room or choose another --output, and "
                "run again: it goes on from here"
            ) from error

    def write(self, name: str, data: bytes, texts: list[str], question: str | None) -> None:
        example = {"id": name, self._media: data}
        example |= {"question": question, "answers": texts} if self._questions else {"captions": texts}
        proto = self._serializer.get_tf_example(self._features.encode_example(example))
        record = proto.SerializeToString(deterministic=True)  # else the order of the features changes by process
        self.bytes += len(record)
        self._call(self._writer.write, record)

    def close(self) -> None:
        self._call(self._writer.close)


def read_info(folder: str) -> tfds.core.DatasetInfo | None:
    """The metadata of a data set in a folder; None if it has none. Raises UserError if they are damaged."""
    if not (epath.Path(folder) / INFO).exists():
        return None
    try:
        return tfds.builder_from_directory(folder).info
    except Exception as error:  # TFDS raises many types
        raise UserError(
            f"{folder}/{INFO} cannot be read ({first_line(error)[:300]}): choose another --output"
        ) from error


def same_features(info: tfds.core.DatasetInfo, media: str, questions: bool) -> bool:
    return info.features.to_json() == features(media, questions).to_json()


def write_metadata(
    folder: Path, output: str, name: str, split: str, lengths: list[int], size: int, kind: tuple[str, bool]
) -> None:
    """Writes the metadata of `output` with a new split to the local `folder`.

    Args:
      lengths: number of records of each shard.
      size: bytes of all records.
      kind: media, and whether the records are questions.
    """
    identity = dataset_info.DatasetIdentity(
        name=name, version=tfds.core.Version(VERSION), data_dir=output, module_name="", config_name=""
    )
    info = tfds.core.DatasetInfo(
        builder=identity,
        description="Prepared by simvlg_jax.",
        features=features(*kind),
    )
    info.set_file_format(SUFFIX)
    before = read_info(output)
    splits = [] if before is None else [one for other, one in before.splits.items() if other != split]
    splits.append(
        tfds.core.SplitInfo(
            name=split, shard_lengths=lengths, num_bytes=size, filename_template=template(output, name, split)
        )
    )
    info.set_splits(tfds.core.splits.SplitDict(splits))
    info.write_to_directory(folder)
