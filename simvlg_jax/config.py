"""Configs: Python files with `get_config(arg)`, overridden from the command line, checked before anything starts."""

import argparse
import difflib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from simvlg_jax import files
from simvlg_jax.errors import UserError

EXAMPLE = Path(__file__).parent / "example"  # the trained example: an exported model


def load_config(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Reads "configs/X.py" or "configs/X.py:arg" and applies overrides such as "--config.train.steps=5".

    Raises:
      UserError (status 2): no such file, an unknown key (nearest names shown), a value of the wrong type.
    """
    path = Path(spec.partition(":")[0])
    if not path.is_file():
        known = ", ".join(sorted(str(p) for p in Path("configs").glob("*.py") if p.stem not in ("__init__", "common")))
        raise UserError(f"no config file {path}; known here: {known or 'none (run from the repository root)'}", 2)
    root = str(path.resolve().parent.parent)
    if root not in sys.path:  # configs import their neighbours as `configs.common`
        sys.path.insert(0, root)
    arguments = ["simvlg_jax", f"--config={spec}", *_check_form(overrides)]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=arguments)
    try:
        values(arguments)
        config = values["config"].value
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(_explain(spec, overrides, error), 2) from error
    check(config)
    return config


def _check_form(overrides: Sequence[str]) -> list[str]:
    for override in overrides:
        if not override.startswith("--config.") or "=" not in override:
            raise UserError(f"cannot read {override!r}: overrides look like --config.train.steps=100", 2)
    return list(overrides)


def _explain(spec: str, overrides: Sequence[str], error: Exception) -> str:
    if overrides:
        keys = flat_keys(load_config(spec))
        for override in overrides:
            key = override.removeprefix("--config.").partition("=")[0]
            if key not in keys:
                near = difflib.get_close_matches(key, keys, 3, 0.5)
                near += [k for k in keys if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1] and k not in near]
                return f"unknown config key {key!r}" + (f"; did you mean {' or '.join(near)}?" if near else "")
    return f"config {spec}: {str(error).strip().splitlines()[-1]}"  # absl puts a config's whole traceback before


def flat_keys(config: ConfigDict, prefix: str = "") -> dict[str, object]:
    """{"train.steps": 1000, ...} in the config's own order."""
    flat: dict[str, object] = {}
    for key, value in config.items():
        nested = isinstance(value, ConfigDict)
        flat.update(flat_keys(value, f"{prefix}{key}.") if nested else {prefix + key: value})
    return flat


def check(config: ConfigDict) -> None:
    """Raises UserError (status 2) for values that cannot work, each with the fix."""

    def one_of(key: str, *allowed: object) -> None:
        value = flat_keys(config)[key]
        if value not in allowed:
            raise UserError(f"{key} is {value!r}; it takes {', '.join(map(repr, allowed))}", 2)

    one_of("task", "caption", "contrastive")
    one_of("dtype", "float32", "bfloat16")
    one_of("frozen_dtype", "float32", "bfloat16")
    one_of("optimizer.schedule", "cosine", "staircase")
    one_of("sentence_encoder.pooling", "mean", "pooler")
    one_of("data.name", "openmoji", "folder", "synthetic")
    for key in ("train.batch_size", "train.accumulate", "train.steps", "train.log_every", "evaluate.batch_size"):
        if flat_keys(config)[key] < 1:
            raise UserError(f"{key} must be at least 1", 2)
    if config.train.batch_size % config.train.accumulate:
        raise UserError("train.batch_size must be a multiple of train.accumulate", 2)
    if config.llm.start_first and config.llm.start_is_target:
        raise UserError("a start token that stands first cannot be a target: llm.start_is_target=False", 2)
    if config.task == "contrastive" and config.train.accumulate > 1:
        raise UserError(
            "the contrastive loss compares within a batch, so accumulating would change it: train.accumulate=1", 2
        )


def save_config(config: ConfigDict, workdir: Path) -> None:
    """Writes workdir/config.json, or checks that the one there is of the same model, data and optimiser.

    Raises:
      UserError: the folder holds another config's run; every difference is shown.
    """
    path = workdir / "config.json"
    mine = json.loads(config.to_json())
    if path.exists():
        theirs = json.loads(path.read_text())
        changed = _differences(_comparable(theirs), _comparable(mine))
        if changed:
            raise UserError(
                f"{workdir} holds a run of another config; use another --workdir, or the same values:\n  "
                + "\n  ".join(changed)
            )
    files.write_json(path, mine)


def _comparable(config: dict) -> dict:
    """What must stay the same over a run: all but how long, how often and on how many devices."""
    flat = flat_keys(ConfigDict(config))
    free = ("train.max_minutes", "train.log_every", "train.eval_every", "train.save_every", "train.keep_")
    return {k: v for k, v in flat.items() if not k.startswith((*free, "mesh.", "evaluate.", "data.read_threads"))}


def _differences(theirs: dict, mine: dict) -> list[str]:
    keys = dict.fromkeys([*theirs, *mine])
    return [f"{k}: {theirs.get(k)!r} there, {mine.get(k)!r} now" for k in keys if theirs.get(k) != mine.get(k)]


def read_config(workdir: Path) -> ConfigDict:
    """The config a run was started with.

    Raises:
      UserError: there is none, it is damaged, or it lacks keys that have come since.
    """
    path = workdir / "config.json"
    try:
        config = ConfigDict(json.loads(path.read_text()))
    except FileNotFoundError:
        raise UserError(f"{workdir} holds no run (no config.json); train one with simvlg_jax.train first") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    today = ConfigDict(json.loads((EXAMPLE / "config.json").read_text()))
    if lacking := [key for key in flat_keys(today) if key not in flat_keys(config)]:
        raise UserError(
            f"{path} was written by an older version and lacks {', '.join(lacking)}: add them there "
            "(configs/common.py says what each means), or train anew in another --workdir"
        )
    return config.lock()


def config_parser(description: str | None, *, required: bool = True, **kwargs) -> argparse.ArgumentParser:
    """A parser with --config; what it leaves over are overrides for `load_config`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs
    )
    parser.add_argument("--config", required=required, help="configs/X.py or configs/X.py:arg")
    parser.epilog = "Any config value can be set: --config.train.steps=100"
    return parser


def add_process_argument(parser: argparse.ArgumentParser) -> None:
    """--distributed: this process is one of several. See `parallel.processes`."""
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="one of several processes, which JAX finds (TPU slice, Slurm, Open MPI) or JAX_COORDINATOR_ADDRESS, "
        "JAX_NUM_PROCESSES and JAX_PROCESS_ID name",
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """--workdir DIR or --example: which trained model. See `model_folder`."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--workdir", type=Path, help="a run of simvlg_jax.train, or an exported model")
    which.add_argument("--example", action="store_true", help="the trained example that comes with the package")


def model_folder(arguments: argparse.Namespace) -> Path:
    """The folder that `add_model_arguments`' flags name."""
    return EXAMPLE if arguments.example else arguments.workdir
