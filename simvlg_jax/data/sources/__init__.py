"""Data sources, interchangeable by `data.name`. A new one is a module here and a line in SOURCES."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ml_collections import ConfigDict

from simvlg_jax.config.check import lookup
from simvlg_jax.data.captions import CLEANERS
from simvlg_jax.data.sources.folder import FolderSource
from simvlg_jax.data.sources.openmoji import OpenMojiSource
from simvlg_jax.data.sources.prepared import PreparedSource
from simvlg_jax.data.sources.source import Record, RecordInfo, Source
from simvlg_jax.data.sources.synthetic import SyntheticSource
from simvlg_jax.data.sources.tfds import TfdsSource
from simvlg_jax.utils.errors import UserError

__all__ = ["SOURCES", "Record", "RecordInfo", "Source", "check_unique_ids", "load_source", "test_splits"]

# Each class implements `Source`, is opened as CLASS(data_config, split, training), and names its SPLITS (empty if they
# differ from data set to data set, and the class checks them) and those that are scored by default, TEST_SPLITS.
SOURCES = {
    "openmoji": OpenMojiSource,
    "folder": FolderSource,
    "prepared": PreparedSource,
    "synthetic": SyntheticSource,
    "tfds": TfdsSource,
}


@dataclass(frozen=True)
class CleanedSource:
    """Cleans the captions of a source, and leaves the references as they are."""

    source: Source
    clean: Callable[[str], str]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:
        record = self.source[index]
        return {**record, "caption": self.clean(record["caption"])}

    def info(self, index: int) -> RecordInfo:
        return self.source.info(index)


def load_source(data_config: ConfigDict, split: str, training: bool = False) -> Source:
    """Opens one split of the data set `data_config.name`, with its captions cleaned by `data_config.clean`.

    Args:
      training: gives one record for each caption, instead of one for each picture with all its captions as references.

    Raises:
      UserError: the data set, the split or the cleaning is unknown, or the data are absent or malformed.
    """
    clean = lookup(CLEANERS, "data.clean", data_config.get("clean", ""))
    kind = lookup(SOURCES, "data.name", data_config.name)
    if kind.SPLITS and split not in kind.SPLITS:
        raise UserError(
            f'the data set "{data_config.name}" has no split "{split}"; it has {", ".join(kind.SPLITS)}', status=2
        )
    return CleanedSource(kind(data_config, split, training), clean)


def test_splits(data_config: ConfigDict) -> list[str]:
    """The splits of the data set that are scored by default."""
    return list(lookup(SOURCES, "data.name", data_config.name).TEST_SPLITS)


def check_unique_ids(ids: Sequence[str]) -> None:
    """Raises UserError if two records share an id: scores go by id, so one record would hide the other."""
    twice = [name for name, count in Counter(ids).items() if count > 1]
    if twice:
        others = f", and {len(twice) - 1} more ids are shared" if len(twice) > 1 else ""
        raise UserError(
            f"two pictures of this split have the id {twice[0]!r}{others}; scores go by id, so give each picture its "
            "own id, and a picture with several captions one record with all of them as references"
        )
