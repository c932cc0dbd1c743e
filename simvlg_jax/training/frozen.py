"""Frozen weights are not saved with a run: it is held to the same ones by name and fingerprint."""

import json
from pathlib import Path

from simvlg_jax.training.fingerprints import fingerprint
from simvlg_jax.utils import files
from simvlg_jax.utils.errors import UserError, warn

FILE = "frozen.json"


def describe_frozen(frozen: dict, sources: dict[str, str]) -> dict[str, dict[str, str]]:
    """Name -> source and fingerprint of each frozen tree, as frozen.json holds them."""
    return {name: {"source": sources[name], "fingerprint": fingerprint(tree)} for name, tree in frozen.items()}


def check_frozen(workdir: Path, found: dict[str, dict[str, str]]) -> None:
    """Holds the frozen weights of a run against workdir/frozen.json.

    Warns if the file is missing or damaged, since then nothing can be checked.

    Raises:
      UserError: these are other weights than the run was started with.
    """
    path = workdir / FILE
    try:
        known = {name: entry["fingerprint"] for name, entry in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        trouble = "is missing" if isinstance(error, FileNotFoundError) else "is damaged"
        warn(f"{path} {trouble}, so whether the frozen weights are those of the start of this run is not checked")
        return
    for name, entry in found.items():
        if known.get(name) != entry["fingerprint"]:
            raise UserError(
                f"the frozen {name} ({entry['source']}) is not the one this run was started with: "
                f"restore the old weights, or start anew in another --workdir"
            )


def write_frozen(workdir: Path, found: dict[str, dict[str, str]]) -> None:
    """Writes workdir/frozen.json."""
    files.write_json(workdir / FILE, found)
