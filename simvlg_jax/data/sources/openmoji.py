"""The OpenMoji example: emoji pictures and their English names."""

import functools
from pathlib import Path

from ml_collections import ConfigDict

from simvlg_jax.data.openmoji import VERSION, splits
from simvlg_jax.data.sources.array_record import read_record
from simvlg_jax.data.sources.source import Record, RecordInfo
from simvlg_jax.utils.errors import UserError


class OpenMojiSource:
    """Reads the ArrayRecord files that `simvlg_jax.data.prepare` writes below `data.dir`."""

    SPLITS = splits.SPLITS
    TEST_SPLITS = ("test", "novel")

    def __init__(self, data_config: ConfigDict, split: str, training: bool = False):
        del training  # each picture has one caption
        folder = Path(data_config.dir) / "openmoji" / VERSION
        if not (folder / "dataset_info.json").is_file():
            raise UserError(
                f"no OpenMoji data in {folder}\n"
                f"prepare it with: python -m simvlg_jax.data.prepare --data_dir {data_config.dir}"
            )
        # Late: nothing but this source needs it.
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(folder)
        # Pictures stay PNG bytes: the pipeline decodes them and tolerates damage.
        self._records = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        record = read_record(self._records, index)
        caption = record["caption"].decode()
        return {"image": record["image"], "caption": caption, "references": [caption], "id": record["id"].decode()}

    @functools.cached_property
    def _infos(self) -> list[RecordInfo | None]:
        """Read once and kept (0.15 s for train), since an ArrayRecord is always read as a whole, picture included."""

        def info(index: int) -> RecordInfo | None:
            try:
                record = self[index]
            except OSError:
                return None
            return RecordInfo(record["id"], record["references"])

        return [info(index) for index in range(len(self))]

    def info(self, index: int) -> RecordInfo:
        found = self._infos[index]
        if found is None:
            raise OSError("the record cannot be read")
        return found
