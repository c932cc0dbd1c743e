"""The config in a run's folder: written when the run starts, compared when it resumes."""

import json
from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from simvlg_jax.config.check import flat_keys
from simvlg_jax.config.load import fill
from simvlg_jax.utils import files
from simvlg_jax.utils.errors import UserError, warn

EXAMPLE = Path(__file__).parent.parent / "example"  # the trained example: an exported model
FREE = (  # prefixes of keys that may change when a run resumes: how long, how often, on how many devices
    "train.max_minutes",
    "train.log_every",
    "train.save_every",
    "train.keep_",
    "mesh.",
    "evals.",
    "evaluate.",
    "data.read_threads",
    "data.allow_outside",
)


def read_config(workdir: Path) -> ConfigDict:
    """The config a run was started with; keys that are newer than the run have their defaults.

    Raises:
      UserError: there is none, or it is damaged.
    """
    path = workdir / "config.json"
    try:
        config = json.loads(path.read_text())
        if not isinstance(config, dict) or not isinstance(config.get("data"), dict):
            raise ValueError("it holds no config")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{workdir} holds no run (no config.json); train one with simvlg_jax.train first") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): put back the one that the run was started with") from error
    return fill(ConfigDict(_with_tuples(config)))


def _with_tuples(value: object) -> object:
    """JSON's lists as tuples, which config files hold and flags can override."""
    if isinstance(value, dict):
        return {key: _with_tuples(each) for key, each in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def save_config(config: ConfigDict, workdir: Path) -> None:
    """Writes workdir/config.json."""
    files.write_json(workdir / "config.json", json.loads(config.to_json()))


def check_workdir(config: ConfigDict, workdir: Path) -> None:
    """Refuses a workdir in which this config would mix with another run.

    A start that left no checkpoint counts for nothing: the next one replaces its files.

    Raises:
      UserError: the folder holds an exported model, or checkpoints of a run of another model, data or optimizer; every
        difference is shown.
    """
    if (workdir / "weights.safetensors").exists():
        raise UserError(f"{workdir} holds an exported model: train in another --workdir")
    if not any((workdir / "checkpoints").glob("*/commit_success.txt")):
        return
    if not (workdir / "config.json").exists():
        path = workdir / "config.json"
        warn(f"{path} is missing, so whether this config is the one that the run was started with is not checked")
        return
    if changed := differences(read_config(workdir), config, lambda key: not key.startswith(FREE)):
        raise UserError(
            f"{workdir} holds a run of another config; use another --workdir, or the same values:\n  "
            + "\n  ".join(changed)
        )


def is_of_model(key: str) -> bool:
    """Whether a key says what the model is, and not where its weights come from or how it is run."""
    free = (".weights", ".tokenizer", ".dropout", ".remat")
    return key.startswith(("task", "vit.", "connector.", "llm.", "sentence_encoder.")) and not key.endswith(free)


def differences(theirs: ConfigDict, mine: ConfigDict, counts: Callable[[str], bool]) -> list[str]:
    """Lines "KEY: VALUE there, VALUE now" for the keys that count and differ between two configs."""
    there, now = (flat_keys(ConfigDict(json.loads(config.to_json()))) for config in (theirs, mine))
    keys = [key for key in dict.fromkeys([*there, *now]) if counts(key)]
    return [f"{k}: {there.get(k)!r} there, {now.get(k)!r} now" for k in keys if there.get(k) != now.get(k)]
