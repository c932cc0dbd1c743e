"""Configs: Python files with `get_config(arg)`, overridden from the command line, checked before anything starts."""

import argparse
import difflib
import json
import math
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from simvlg_jax import files
from simvlg_jax.errors import UserError, warn

EXAMPLE = Path(__file__).parent / "example"  # the trained example: an exported model

POSITIVE, BELOW_1 = math.nextafter(0, 1), math.nextafter(1, 0)
ONE_UP, ZERO_UP, SHARE = (1, math.inf), (0, math.inf), (0, BELOW_1)
REQUIRED = (  # keys without which nothing can be checked
    "task", "dtype", "frozen_dtype", "optimizer.schedule", "sentence_encoder.pooling", "data.name", "data.crop_scale",
    "connector.merges", "train.batch_size", "train.accumulate", "llm.start_first", "llm.start_is_target",
)  # fmt: skip
FORMER = {"data.allow_outside": False}  # keys that came later -> what they are in a config without them
RANGES = {  # smallest and greatest value of each number; ".*" stands for all keys of a group
    "seed": (0, 2**32 - 1),
    "vit.max_frames": ZERO_UP,
    "connector.r": ZERO_UP,
    "connector.inflect": (-1, 1),
    "connector.tokens": ZERO_UP,
    "connector.dropout": SHARE,
    "llm.dropout": SHARE,
    "llm.max_text_tokens": ONE_UP,
    "data.synthetic_size.*": ONE_UP,
    "data.pad_multiple": ZERO_UP,
    "data.length_window": ONE_UP,
    "data.workers": ZERO_UP,
    "data.read_threads": ONE_UP,
    "train.batch_size": ONE_UP,
    "train.accumulate": ONE_UP,
    "train.beta": ZERO_UP,
    "train.steps": ONE_UP,
    "train.max_minutes": ZERO_UP,
    "train.log_every": ONE_UP,
    "train.eval_every": ZERO_UP,
    "train.save_every": ONE_UP,
    "train.keep_best": ZERO_UP,
    "train.keep_last": ONE_UP,
    "optimizer.lr": (POSITIVE, math.inf),
    "optimizer.lr_multipliers.*": ZERO_UP,
    "optimizer.min_lr": ZERO_UP,
    "optimizer.warmup_lr": ZERO_UP,
    "optimizer.warmup_steps": ZERO_UP,
    "optimizer.inner_epoch_steps": ONE_UP,
    "optimizer.weight_decay": ZERO_UP,
    "optimizer.b1": SHARE,
    "optimizer.b2": SHARE,
    "optimizer.eps": (POSITIVE, math.inf),
    "optimizer.clip_norm": ZERO_UP,
    "mesh.data": (-1, math.inf),
    "mesh.fsdp": (-1, math.inf),
    "mesh.tensor": (-1, math.inf),
    "evaluate.batch_size": ONE_UP,
    "evaluate.max_new_tokens": ONE_UP,
    "evaluate.min_new_tokens": ZERO_UP,
    "evaluate.repetition_penalty": (POSITIVE, math.inf),
    "evaluate.max_examples": ZERO_UP,
}


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
    try:
        config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=arguments)
        values(arguments)
        config = values["config"].value
    except Exception as error:  # a config file is code and may raise anything
        keys = flat_keys(load_config(spec)) if overrides else {}
        raise UserError(_explain(f"config {spec}", keys, overrides, error), 2) from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"config {spec}: get_config returns {type(config).__name__} instead of a ConfigDict", 2)
    check(config)
    return config


def override(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """A copy of a config with overrides such as "--config.evaluate.batch_size=64" applied. Raises as `load_config`."""
    arguments = ["simvlg_jax", *_check_form(overrides)]
    values, copy = flags.FlagValues(), config.copy_and_resolve_references()
    try:
        config_flags.DEFINE_config_dict("config", copy, flag_values=values, sys_argv=arguments)
        values(arguments)
        changed = values["config"].value
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(_explain("config", flat_keys(config), overrides, error), 2) from error
    check(changed, [given.removeprefix("--config.").partition("=")[0] for given in overrides])
    return changed.lock()


def _check_form(overrides: Sequence[str]) -> list[str]:
    for override in overrides:
        if not override.startswith("--config.") or "=" not in override:
            raise UserError(f"cannot read {override!r}: overrides look like --config.train.steps=100", 2)
    return list(overrides)


def _explain(name: str, keys: Collection[str], overrides: Sequence[str], error: Exception) -> str:
    for given in overrides:
        key = given.removeprefix("--config.").partition("=")[0]
        if key not in keys:
            near = difflib.get_close_matches(key, keys, 3, 0.5)
            near += [k for k in keys if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1] and k not in near]
            return f"unknown config key {key!r}" + (f"; did you mean {' or '.join(near)}?" if near else "")
    if isinstance(error, flags.IllegalFlagValueError) and overrides:
        return str(error).strip().splitlines()[-1]
    # absl puts its own errors around the config's.
    while (cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) is not None:
        error = cause
    if isinstance(error, SyntaxError):
        return f"{name}: line {error.lineno}: {error.msg}"
    lines = str(error).strip().splitlines() or [""]
    message = f"{type(error).__name__}: {lines[-1]}" if not isinstance(error, flags.Error | ValueError) else lines[-1]
    return f"{name}: {message}"


def flat_keys(config: ConfigDict, prefix: str = "") -> dict[str, object]:
    """{"train.steps": 1000, ...} in the config's own order."""
    flat: dict[str, object] = {}
    for key, value in config.items():
        nested = isinstance(value, ConfigDict)
        flat.update(flat_keys(value, f"{prefix}{key}.") if nested else {prefix + key: value})
    return flat


def check(config: ConfigDict, keys: Collection[str] | None = None) -> None:
    """Raises UserError (status 2) for values that cannot work, each with the fix.

    Args:
      keys: whose range is checked; all by default. Older versions accepted numbers that are now out of range.
    """
    flat = flat_keys(config)
    if lacking := [key for key in REQUIRED if key not in flat]:
        raise UserError(f"the config lacks {', '.join(lacking)}: start from the get_config of configs/common.py", 2)

    def one_of(key: str, *allowed: object) -> None:
        value = flat[key]
        if value not in allowed:
            raise UserError(f"{key} is {value!r}; it takes {', '.join(map(repr, allowed))}", 2)

    one_of("task", "caption", "contrastive")
    one_of("dtype", "float32", "bfloat16")
    one_of("frozen_dtype", "float32", "bfloat16")
    one_of("optimizer.schedule", "cosine", "staircase")
    one_of("sentence_encoder.pooling", "mean", "pooler")
    one_of("data.name", "openmoji", "folder", "synthetic")
    for key in keys or flat:
        check_range(key, flat[key])
    scale = config.data.crop_scale
    if len(scale) != 2 or not all(map(is_number, scale)) or not 0 < scale[0] <= scale[1] <= 1:
        raise UserError(f"data.crop_scale is {scale}; it takes two shares of the area, as (0.5, 1.0)", 2)
    if not all(isinstance(r, int) and r >= 0 for r in config.connector.merges):
        raise UserError(f"connector.merges is {config.connector.merges}; it takes a number of tokens for each layer", 2)
    if config.train.batch_size % config.train.accumulate:
        raise UserError("train.batch_size must be a multiple of train.accumulate", 2)
    if config.llm.start_first and config.llm.start_is_target:
        raise UserError("a start token that stands first cannot be a target: llm.start_is_target=False", 2)


def is_number(value: object) -> bool:
    """Whether a config value is an int or a float, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_range(key: str, value: object) -> None:
    """Raises UserError (status 2) if a number of the config is outside of its range in RANGES."""
    if not is_number(value):
        return
    group = key.rpartition(".")[0] + ".*"
    low, high = RANGES.get(key) or RANGES.get(group) or (-math.inf, math.inf)  # a config may have keys of its own
    if low <= value <= high and math.isfinite(value):
        return
    least = "above 0" if low == POSITIVE else f"at least {low}"
    most = {math.inf: "", BELOW_1: " and below 1"}.get(high, f" and at most {high}")
    raise UserError(f"{key} is {value}; it must be {least}{most}", 2)


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
    path = workdir / "config.json"
    if not path.exists():
        warn(f"{path} is missing, so whether this config is the one that the run was started with is not checked")
        return
    if changed := differences(_read(path), json.loads(config.to_json()), _stays):
        raise UserError(
            f"{workdir} holds a run of another config; use another --workdir, or the same values:\n  "
            + "\n  ".join(changed)
        )


def save_config(config: ConfigDict, workdir: Path) -> None:
    """Writes workdir/config.json."""
    files.write_json(workdir / "config.json", json.loads(config.to_json()))


def _stays(key: str) -> bool:
    """Whether a key must stay the same over a run: all but how long, how often and on how many devices."""
    free = ("train.max_minutes", "train.log_every", "train.eval_every", "train.save_every", "train.keep_")
    return not key.startswith((*free, "mesh.", "evaluate.", "data.read_threads", "data.allow_outside"))


def is_of_model(key: str) -> bool:
    """Whether a key says what the model is, and not where its weights come from or how it is run."""
    free = (".weights", ".tokenizer", ".dropout", ".remat")
    return key.startswith(("task", "vit.", "connector.", "llm.", "sentence_encoder.")) and not key.endswith(free)


def differences(theirs: dict, mine: dict, counts: Callable[[str], bool]) -> list[str]:
    """Lines "KEY: VALUE there, VALUE now" for the keys that count and differ between two nested configs."""
    there, now = flat_keys(ConfigDict(theirs)), flat_keys(ConfigDict(mine))
    keys = [key for key in dict.fromkeys([*there, *now]) if counts(key)]
    return [f"{k}: {there.get(k)!r} there, {now.get(k)!r} now" for k in keys if there.get(k) != now.get(k)]


def _read(path: Path) -> dict:
    """A config.json of this version or an older one."""
    try:
        config = json.loads(path.read_text())
        if not isinstance(config, dict) or not isinstance(config.get("data"), dict):
            raise ValueError("it holds no config")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): put back the one that the run was started with") from error
    for key, value in FORMER.items():
        group, name = key.split(".")
        config[group].setdefault(name, value)
    return config


def _with_tuples(value: object) -> object:
    """JSON's lists as the tuples that config files hold, of which flags override only those."""
    if isinstance(value, dict):
        return {key: _with_tuples(each) for key, each in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def read_config(workdir: Path) -> ConfigDict:
    """The config a run was started with.

    Raises:
      UserError: there is none, it is damaged, or it lacks keys that have come since.
    """
    path = workdir / "config.json"
    try:
        config = ConfigDict(_with_tuples(_read(path)))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{workdir} holds no run (no config.json); train one with simvlg_jax.train first") from None
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


def add_checkpoint_argument(parser: argparse.ArgumentParser) -> None:
    """--checkpoint best, latest or a step."""
    parser.add_argument(
        "--checkpoint",
        default="best",
        metavar="STEP",
        help="best (by validation score, the default), latest, or a step",
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """--workdir DIR or --example: which trained model. See `model_folder`."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--workdir", type=Path, help="a run of simvlg_jax.train, or an exported model")
    which.add_argument("--example", action="store_true", help="the trained example that comes with the package")


def model_folder(arguments: argparse.Namespace) -> Path:
    """The folder that `add_model_arguments`' flags name."""
    return EXAMPLE if arguments.example else arguments.workdir
