"""The config in a run's workdir: saved when the run starts, compared when the run resumes."""

import json
from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from simvlg_jax.config.check import flat_keys
from simvlg_jax.config.load import fill
from simvlg_jax.utils import files
from simvlg_jax.utils.errors import UserError, warn

EXAMPLE = Path(__file__).parent.parent / "example"  # the trained example: an exported model
FREE = (  # prefixes of keys that may change when a run resumes: durations, intervals and devices
    "train.max_minutes",
    "train.log_every",
    "train.save_every",
    "train.best_by",
    "train.keep_",
    "mesh.",
    "evals.",
    "evaluate.",
    "data.read_threads",
    "data.allow_outside",
    "data.max_skipped",
)
# The weights fit any schedule of merges, and any way to join frames.
CONNECTOR_MERGING = (
    "connector.merges",
    "connector.r",
    "connector.inflect",
    "connector.tokens",
    "connector.budgets",
)
MERGING = (*CONNECTOR_MERGING, "vit.r", "vit.tokens", "video.frames_as", "video.tokens")


def read_config(workdir: Path) -> ConfigDict:
    """Returns the config that a run was started with. Keys that are newer than the run have their defaults.

    Raises:
      UserError: the config is missing or damaged.
    """
    path = workdir / "config.json"
    try:
        config = json.loads(path.read_text())
        if not isinstance(config, dict) or not isinstance(config.get("data"), dict):
            raise ValueError("it holds no config")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{workdir} holds no run (no config.json); train one with simvlg_jax.train first") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): restore the file that the run was started with") from error
    return fill(ConfigDict(_with_tuples(config)))


def _with_tuples(value: object) -> object:
    """Returns the value with lists turned into tuples, which config files contain and flags can override."""
    if isinstance(value, dict):
        return {key: _with_tuples(each) for key, each in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def save_config(config: ConfigDict, workdir: Path) -> None:
    """Writes workdir/config.json."""
    files.write_json(workdir / "config.json", json.loads(config.to_json()))


def check_workdir(config: ConfigDict, workdir: Path) -> None:
    """Refuses a workdir that belongs to another model or run.

    Files of a run that saved no checkpoint are ignored; the next run replaces them.

    Raises:
      UserError: the workdir holds an exported model, or checkpoints of a run with another model, data or optimizer.
        The message lists every difference.
    """
    if (workdir / "weights.safetensors").exists():
        raise UserError(f"{workdir} holds an exported model: train in another --workdir")
    if not any((workdir / "checkpoints").glob("*/commit_success.txt")):
        return
    if not (workdir / "config.json").exists():
        path = workdir / "config.json"
        warn(f"{path} is missing, so this config cannot be compared with the one that the run was started with")
        return
    if changed := differences(read_config(workdir), config, lambda key: not key.startswith(FREE)):
        raise UserError(
            f"{workdir} holds a run of another config; use another --workdir, or the same values:\n  "
            + "\n  ".join(changed)
        )


def is_of_model(key: str) -> bool:
    """Returns whether a key defines the weights, and not where they come from or how the model is run."""
    free = (".weights", ".tokenizer", ".dropout", ".remat", ".position_norm")
    of_part = key.startswith(("task", "vit.", "video.", "connector.", "llm.", "sentence_encoder."))
    return of_part and not key.endswith(free) and key not in MERGING


def differences(saved: ConfigDict, given: ConfigDict, is_compared: Callable[[str], bool]) -> list[str]:
    """Returns a line "KEY: VALUE there, VALUE now" for each compared key that differs between two configs."""
    there, now = (flat_keys(ConfigDict(json.loads(config.to_json()))) for config in (saved, given))
    keys = [key for key in dict.fromkeys([*there, *now]) if is_compared(key)]
    return [f"{k}: {there.get(k)!r} there, {now.get(k)!r} now" for k in keys if there.get(k) != now.get(k)]
