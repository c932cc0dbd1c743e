"""Data sets of TensorFlow Datasets with pictures and captions, such as coco_captions, read without TensorFlow."""

import os
from collections.abc import Iterator
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from simvlg_jax.data.captions import well_formed
from simvlg_jax.data.sources.array_record import read_record
from simvlg_jax.data.sources.source import Record, RecordInfo
from simvlg_jax.utils.errors import UserError

CAPTIONS = ("caption", "captions", "captions/text", "text", "texts", "sentence", "sentences", "description")
IDS = ("id", "image/id", "image_id", "image/filename", "filename", "file_name")


class TfdsSource:
    """Reads a split of `data.path`: the folder of a prepared data set, or its name ("coco_captions:1.1.0").

    Names are looked up below `data.dir`. The picture is the data set's image feature, and `data.caption_key` names the
    captions if they have another name than those of CAPTIONS; "a/b" is the feature b of a. A record is a picture.
    Training draws one of its captions (`choices`) for each view.

    Raises UserError if the data set, its split, its picture or its captions are not found, or if it is not in the
    format "array_record", the one that can be read at random.
    """

    SPLITS = ()
    TEST_SPLITS = ("test",)

    def __init__(self, data_config: ConfigDict, split: str, training: bool = False):
        del training  # training draws a caption, so that opening need not count the captions of all records
        # Late: sources of other formats do not need it.
        import tensorflow_datasets as tfds

        self._name = data_config.path
        builder = _open(data_config.path, data_config.dir)
        if split not in builder.info.splits:
            raise UserError(f"{self._name} has no split {split!r}; it has {', '.join(builder.info.splits)}", status=2)
        if builder.info.file_format is None or builder.info.file_format.value != "array_record":
            raise UserError(
                f'{self._name} is in the format "{builder.info.file_format}", which cannot be read at random; write it '
                'again with file_format="array_record"'
            )
        features = dict(_flat(builder.info.features))
        pictures = [name for name, feature in features.items() if isinstance(feature, tfds.features.Image)]
        self._image = next((name for name in ("image", *pictures) if name in pictures), None)
        self._captions = next((name for name in [data_config.caption_key or None, *CAPTIONS] if name in features), None)
        if self._image is None or self._captions is None or data_config.caption_key not in ("", self._captions):
            absent = "picture" if self._image is None else "captions"
            raise UserError(
                f"no {absent} among the features of {self._name}: {', '.join(sorted(features))}; "
                "data.caption_key names the captions",
                status=2,
            )
        self._id = next((name for name in IDS if name in features), None)
        skip = tfds.decode.SkipDecoding()
        for key in reversed(self._image.split("/")):
            skip = {key: skip}
        self._records = builder.as_data_source(split, decoders=skip)

    def __len__(self) -> int:
        return len(self._records)

    def _read(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return read_record(self._records, index)

    def _info(self, index: int, record: dict[str, Any]) -> RecordInfo:
        captions = _get(record, self._captions)
        captions = [captions] if isinstance(captions, bytes) else list(captions)
        texts = [well_formed(caption.decode("utf-8", "replace")) for caption in captions]
        name = str(index) if self._id is None else _get(record, self._id)
        return RecordInfo(name.decode() if isinstance(name, bytes) else str(name), texts)

    def info(self, index: int) -> RecordInfo:
        """Reads the whole record, since ArrayRecord files cannot leave out the picture."""
        return self._info(index, self._read(index))

    def __getitem__(self, index: int) -> Record:
        record = self._read(index)
        name, texts, *_ = self._info(index, record)
        if not texts:
            raise ValueError(f"record {index} of {self._name} has no caption")
        image = _get(record, self._image)
        return {"image": image, "caption": texts[0], "references": texts, "id": name, "choices": texts}


def _open(path: str, data_dir: str) -> Any:
    """Opens a prepared data set by its folder or its name."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import read_only_builder

    if not path:
        raise UserError('the data set "tfds" needs data.path, a name such as "coco_captions" or a folder', status=2)
    if (epath.Path(path) / "dataset_info.json").exists():
        return tfds.builder_from_directory(os.fspath(path))
    try:
        return read_only_builder.builder_from_files(path, data_dir=os.fspath(data_dir))
    except (ValueError, OSError) as error:  # not found, or not a name
        raise UserError(
            f"{path} is neither a folder with a dataset_info.json nor prepared in {data_dir}; where TensorFlow is "
            f"installed, write it with: tfds build {path} --data_dir {data_dir} --file_format array_record"
        ) from error


def _flat(features: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields ("a/b", feature) of nested features; a sequence of dicts reads as a dict of sequences."""
    for name, feature in features.items():
        inner = getattr(feature, "feature", feature)
        if hasattr(inner, "items"):
            yield from _flat(inner, f"{prefix}{name}/")
        else:
            yield prefix + name, feature


def _get(record: dict[str, Any], path: str) -> Any:
    """Returns the value at "a/b". Names may themselves contain slashes ("image/id")."""
    if path in record:
        return record[path]
    first, _, rest = path.partition("/")
    return _get(record[first], rest)
