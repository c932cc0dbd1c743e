"""Frozen weights are not saved with a run. Their sources and fingerprints are, and a resumed run checks them."""

import json
from pathlib import Path

from simvlg_jax.training.fingerprints import fingerprint
from simvlg_jax.utils import files
from simvlg_jax.utils.errors import UserError, warn

FILE = "frozen.json"


def describe_frozen(frozen: dict, sources: dict[str, str]) -> dict[str, dict[str, str]]:
    """Returns {name: source and fingerprint} of the frozen trees, as frozen.json holds them."""
    return {name: {"source": sources[name], "fingerprint": fingerprint(tree)} for name, tree in frozen.items()}


def check_frozen(workdir: Path, found: dict[str, dict[str, str]]) -> None:
    """Compares the frozen weights with workdir/frozen.json.

    Warns if the file is missing or damaged, since nothing can be compared then.

    Raises:
      UserError: the weights differ from those that the run was started with.
    """
    path = workdir / FILE
    try:
        saved = {name: entry["fingerprint"] for name, entry in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        trouble = "is missing" if isinstance(error, FileNotFoundError) else "is damaged"
        warn(f"{path} {trouble}, so the frozen weights cannot be compared with those that the run was started with")
        return
    for name, entry in found.items():
        if saved.get(name) != entry["fingerprint"]:
            raise UserError(
                f"the frozen {name} ({entry['source']}) is not the one this run was started with: restore the old "
                "weights and config.frozen_dtype, or start a new run in another --workdir"
            )


def write_frozen(workdir: Path, found: dict[str, dict[str, str]]) -> None:
    """Writes workdir/frozen.json."""
    files.write_json(workdir / FILE, found)
