"""Several training sources in fixed proportions: `config.data.mixture`."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import grain
import numpy as np
from ml_collections import ConfigDict

from simvlg_jax.data.batch import BatchSpec
from simvlg_jax.data.examples import examples
from simvlg_jax.data.sources import Record, RecordInfo, Source, load_source
from simvlg_jax.data.sources.share import Share
from simvlg_jax.utils.errors import UserError

OWN = ("weight", "split")  # keys of an entry that are none of config.data


class Part(NamedTuple):
    """One source of a mixture.

    Attributes:
      name: the name of the entry; "" for a source on its own.
      weight: number of examples, relative to the other parts'.
      config: its data config.
    """

    name: str
    weight: float
    source: Source
    config: ConfigDict


class Mixture:
    """The parts of a mixture one after the other, as a source; training draws from it by weights."""

    def __init__(self, parts: Sequence[Part]):
        self.parts = tuple(parts)
        self._ends = np.cumsum([len(part.source) for part in self.parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _find(self, index: int) -> tuple[Source, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self.parts[number].source, int(index - (self._ends[number - 1] if number else 0))

    def __getitem__(self, index: int) -> Record:
        source, number = self._find(index)
        return source[number]

    def info(self, index: int) -> RecordInfo:
        source, number = self._find(index)
        return source.info(number)


def load_training(data_config: ConfigDict) -> Source:
    """Opens the training data: the split "train" of one source, or the sources of `data_config.mixture`.

    Of each source, `data.share` of the records are taken.

    An entry of the mixture takes the keys that it does not name from `data_config`.

    Raises:
      UserError: as `load_source`; the message names the entry.
    """
    entries = data_config.get("mixture", {})
    if not entries:
        return _share(data_config, "train")
    parts = []
    for name, entry in entries.items():
        config = ConfigDict({key: value for key, value in data_config.items() if key != "mixture"})
        config.update({key: value for key, value in entry.items() if key not in OWN})
        try:
            source = _share(config, entry.get("split", "train"))
        except UserError as error:
            raise UserError(f"data.mixture.{name}: {error}", error.status) from error
        parts.append(Part(name, entry.get("weight", 1.0), source, config))
    return Mixture(parts)


def _share(data_config: ConfigDict, split: str) -> Source:
    source, share = load_source(data_config, split, training=True), data_config.get("share", 1.0)
    return source if share == 1 else Share(source, share)


def parts_of(data_config: ConfigDict, source: Source) -> Sequence[Part]:
    """The parts of a mixture; of another source itself."""
    return source.parts if isinstance(source, Mixture) else (Part("", 1.0, source, data_config),)


def mixed_examples(parts: Sequence[Part], spec: BatchSpec, seed: int) -> grain.MapDataset:
    """Endless training examples of all parts by their weights: any run of examples has each in its proportion.

    Every part has its own order and its own epochs, which depend on the seed and on its name.
    """
    if len(parts) == 1:
        (part,) = parts
        return examples(part.config, part.source, spec, seed, part.name)
    datasets = [examples(part.config, part.source, spec, _seed_of(seed, part.name), part.name) for part in parts]
    return grain.MapDataset.mix(datasets, [part.weight for part in parts])


def _seed_of(seed: int, name: str) -> int:
    word = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    return int(np.random.SeedSequence([seed, word]).generate_state(1)[0])
