"""Formats that `prepare` reads. A new one is a module here and a line in READERS."""

import os
from collections.abc import Sequence

from etils import epath

from simvlg_jax.config.check import lookup
from simvlg_jax.data.readers import files, lavis, paths, table, video, webdataset
from simvlg_jax.data.readers.reader import Example, Item, Options, Plan, Reader, Shard, Skip
from simvlg_jax.utils.errors import UserError

__all__ = [
    "LABELLED_BY_ROWS",
    "READERS",
    "Example",
    "Item",
    "Options",
    "Plan",
    "Reader",
    "Shard",
    "Skip",
    "choose",
    "resolve",
]

# In the order in which a source is compared with them.
READERS: dict[str, Reader] = {
    "webdataset": webdataset,
    "files": files,
    "video": video,
    "table": table,
    "lavis": lavis,
}

# Formats whose captions and answers are columns of rows, so that a row without them is still a record.
LABELLED_BY_ROWS = ("table", "lavis")


def resolve(sources: Sequence[str]) -> list[str]:
    """Expands patterns in sources. Raises UserError if a source, or every file of a pattern, is absent."""
    found = []
    for source in sources:
        expanded = paths.expand(source)
        try:
            there = any(epath.Path(path).exists() for path in expanded)
        except ImportError as error:
            raise UserError(
                f"{source} needs a package for this kind of bucket ({error}); for gs:// run: pip install gcsfs"
            ) from error
        if not there:
            raise UserError(f"there is no {source}: give --source a folder, a file or a pattern that exists")
        found += expanded
    return found


def choose(sources: Sequence[str], name: str) -> tuple[str, Reader]:
    """Returns the reader of a format by its name, or the one that recognises the sources if it is "auto".

    Raises UserError if no reader does, or different ones.
    """
    if name != "auto":
        return name, lookup(READERS, "--format", name)
    names = {source: _recognise(source) for source in sources if epath.Path(source).exists()}
    kinds = sorted(set(names.values()))
    if len(kinds) > 1:
        first = [next(source for source in names if names[source] == kind) for kind in kinds]
        raise UserError(
            f"{first[0]} has the format {kinds[0]}, and {first[1]} the format {kinds[1]}: prepare them separately, "
            "with another --split or --output"
        )
    return kinds[0], READERS[kinds[0]]


def _recognise(source: str) -> str:
    path = epath.Path(source)
    found = next((name for name, reader in READERS.items() if reader.recognises(path)), None)
    if found is None:
        what = "folder" if path.is_dir() else "file"
        raise UserError(
            f"{os.fspath(source)} is no {what} of a known format (pictures or videos with captions beside them, "
            "WebDataset tars, JSON of LAVIS, JSONL, CSV or Parquet); see docs/data.md, or choose one with --format"
        )
    return found
