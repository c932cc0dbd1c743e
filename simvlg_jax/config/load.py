"""Loads configs: Python files with `get_config(argument)`, command-line overrides and a check of all values."""

import difflib
import importlib.util
import inspect
from collections.abc import Collection, Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from simvlg_jax.config import defaults
from simvlg_jax.config.check import check, flat_keys
from simvlg_jax.utils.errors import UserError

FORMER = {"train.eval_every": "evals.val.every", "evaluate.max_examples": "evals.val.max_examples"}  # before `evals`
DROPPED = {"data.length_window": 1}  # former keys, and the value at which a config means the same without them
# Groups that take names of one's own.
OPEN = ("evals.", "optimizer.lr_multipliers.", "data.synthetic_size.", "data.mixture.")
SHARED = {"data": "data", "decoding": "evaluate"}  # group of an evaluation -> where the keys stand that it may change
RECIPES = Path(__file__).parent.parent / "recipes"  # the repository's configs/, which the wheel contains


def load_config(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Reads "configs/X.py" or "configs/X.py:argument" and applies overrides such as "--config.train.steps=5".

    A recipe of the package is found by its name from any working directory. A key that the file does not set gets its
    default.

    Raises:
      UserError (status 2): no such file, an unknown key (the message lists similar ones) or a value of the wrong type.
    """
    config = read_file(spec)
    filled = fill(config)
    known = flat_keys(defaults.get_config())
    for key in flat_keys(config):
        if key not in known and not key.startswith(OPEN):
            raise UserError(f"config {spec}: {_unknown(key, known)}", 2)
    config = change(filled, overrides)
    check(config)
    return config


def read_file(spec: str) -> ConfigDict:
    """Returns what `get_config` of a config file returns. The file and the errors are those of `load_config`."""
    name, _, argument = spec.partition(":")
    path = _find(name)
    try:
        module_spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
        if argument and not inspect.signature(module.get_config).parameters:
            raise ValueError(f"it takes no argument: got {argument!r}")
        config = module.get_config(argument) if argument else module.get_config()
    except Exception as error:  # a config file is code and may raise anything
        raise UserError(f"config {spec}: {_cause(error)}", 2) from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"config {spec}: get_config returns {type(config).__name__} instead of a ConfigDict", 2)
    return config


def override(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """Returns a copy of a run's config with overrides such as "--config.evaluate.batch_size=64" applied.

    Only the ranges of overridden numbers are checked: older versions accepted some that are now out of range.

    Raises:
      UserError (status 2): as `load_config`.
    """
    changed = change(config, overrides)
    check(changed, [given.removeprefix("--config.").partition("=")[0] for given in overrides])
    return changed


def fill(config: ConfigDict) -> ConfigDict:
    """Returns a locked copy in which absent keys have their defaults (see `defaults`)."""

    filled = config.copy_and_resolve_references()
    with filled.unlocked():
        for key, value in DROPPED.items():
            group, name = key.split(".")
            if config.get(group, {}).get(name) == value:
                del filled[group][name]
        if "evals" in filled:
            default = defaults.get_config()
            default.evals = ConfigDict({name: defaults.get_eval() for name in filled.evals})
        else:
            default = _with_former_evaluation(filled)
        _add(filled, default)
    return filled.lock()


def _add(given: ConfigDict, default: ConfigDict) -> None:
    for key, value in default.items():
        if key not in given:
            given[key] = value
        elif isinstance(value, ConfigDict) and isinstance(given[key], ConfigDict):
            _add(given[key], value)


def _with_former_evaluation(config: ConfigDict) -> ConfigDict:
    """Returns the defaults with the values under former keys of a config, which are removed from it."""
    default = defaults.get_config()
    for former, key in FORMER.items():
        group, name = former.split(".")
        if name in config.get(group, {}):
            default.evals.val[key.rsplit(".", 1)[1]] = config[group][name]
            del config[group][name]
    return default


def _find(name: str) -> Path:
    """Returns the path of a config file: the path itself if the file exists, else a recipe of the package."""
    for path in (Path(name), RECIPES / Path(name).name):
        if path.is_file() and (path == Path(name) or Path(name).parent in (Path("configs"), Path())):
            return path
    recipes = ", ".join(f"configs/{path.name}" for path in sorted(RECIPES.glob("*.py")))
    raise UserError(f"no config file {name}; the package has {recipes}", 2)


def change(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """Returns a locked copy of any config with overrides applied. Raises UserError (status 2) as `load_config`."""
    for given in overrides:
        if not given.startswith("--config.") or "=" not in given:
            raise UserError(f"cannot read {given!r}: overrides look like --config.train.steps=100", 2)
    arguments = ["simvlg_jax", *overrides]
    values, copy = flags.FlagValues(), config.copy_and_resolve_references()
    with copy.unlocked():
        _add_own(copy, overrides)
    try:
        config_flags.DEFINE_config_dict("config", copy, flag_values=values, sys_argv=arguments)
        values(arguments)
        return values["config"].value.lock()
    except (flags.Error, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(_explain(flat_keys(config), overrides, error), 2) from error


def _add_own(config: ConfigDict, overrides: Sequence[str]) -> None:
    """Gives evaluations the keys of their own that overrides set, with the values that they have without them."""
    for given in overrides:
        match given.removeprefix("--config.").partition("=")[0].split("."):
            case ["evals", name, group, key] if name in config.get("evals", {}) and group in SHARED:
                own, shared = config.evals[name][group], config[SHARED[group]]
                if key not in own and key in shared and not isinstance(shared[key], ConfigDict):
                    own[key] = shared[key]


def _explain(keys: Collection[str], overrides: Sequence[str], error: Exception) -> str:
    for given in overrides:
        key = given.removeprefix("--config.").partition("=")[0]
        if key not in keys:
            return _unknown(key, keys)
    if isinstance(error, flags.IllegalFlagValueError):
        return str(error).strip().splitlines()[-1]
    return _cause(error)


def _unknown(key: str, keys: Collection[str]) -> str:
    """Returns the message about a key that is none of `keys`."""
    if key in FORMER:
        return f"the config key {key!r} is now {FORMER[key]!r}"
    near = difflib.get_close_matches(key, keys, 3, 0.5)
    near += [k for k in keys if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1] and k not in near]
    return f"unknown config key {key!r}" + (f"; did you mean {' or '.join(near)}?" if near else "")


def _cause(error: Exception) -> str:
    """Returns the original error of a chain in one line."""
    while (cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) is not None:
        error = cause
    if isinstance(error, ModuleNotFoundError) and str(error.name).startswith("configs"):
        return f"{error}; the defaults are in simvlg_jax.config.defaults, the recipes in simvlg_jax.recipes"
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: {error.msg}"
    lines = str(error).strip().splitlines() or [""]
    return lines[-1] if isinstance(error, flags.Error | ValueError) else f"{type(error).__name__}: {lines[-1]}"
