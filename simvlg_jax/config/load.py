"""Configs: Python files with `get_config(argument)`, overridden from the command line and checked at the start."""

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

RECIPES = Path(__file__).parent.parent / "recipes"  # the repository's configs/, which the wheel brings along


def load_config(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Reads "configs/X.py" or "configs/X.py:argument" and applies overrides such as "--config.train.steps=5".

    A recipe of the package is found by its name wherever the program is started. A key that the file leaves out gets
    its default.

    Raises:
      UserError (status 2): no such file, an unknown key (nearest names shown), a value of the wrong type.
    """
    name, _, argument = spec.partition(":")
    path = _find(name)
    try:
        module_spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
        if argument and not inspect.signature(module.get_config).parameters:
            raise ValueError(f"it takes no argument, and {argument!r} is given")
        config = module.get_config(argument) if argument else module.get_config()
    except Exception as error:  # a config file is code and may raise anything
        raise UserError(f"config {spec}: {_cause(error)}", 2) from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"config {spec}: get_config returns {type(config).__name__} instead of a ConfigDict", 2)
    config = _apply(fill(config), overrides)
    check(config)
    return config


def override(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """A copy of a run's config with overrides such as "--config.evaluate.batch_size=64" applied.

    Only the overridden numbers are held to their ranges: older versions accepted some that are now out of range.
    Raises as `load_config`.
    """
    changed = _apply(config, overrides)
    check(changed, [given.removeprefix("--config.").partition("=")[0] for given in overrides])
    return changed


def fill(config: ConfigDict) -> ConfigDict:
    """A locked copy in which every key that is absent has its default (see `defaults`)."""

    filled = config.copy_and_resolve_references()
    with filled.unlocked():
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
    """The defaults, with what a config from before `evals` said of its one evaluation, which is taken out of it."""
    default = defaults.get_config()
    for group, former, key in (("train", "eval_every", "every"), ("evaluate", "max_examples", "max_examples")):
        if former in config.get(group, {}):
            default.evals.val[key] = config[group][former]
            del config[group][former]
    return default


def _find(name: str) -> Path:
    """The config file of a name: as it stands, else a recipe of the package."""
    for path in (Path(name), RECIPES / Path(name).name):
        if path.is_file() and (path == Path(name) or Path(name).parent in (Path("configs"), Path())):
            return path
    known = ", ".join(f"configs/{path.name}" for path in sorted(RECIPES.glob("*.py")))
    raise UserError(f"no config file {name}; the package has {known}", 2)


def _apply(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    for given in overrides:
        if not given.startswith("--config.") or "=" not in given:
            raise UserError(f"cannot read {given!r}: overrides look like --config.train.steps=100", 2)
    arguments = ["simvlg_jax", *overrides]
    values, copy = flags.FlagValues(), config.copy_and_resolve_references()
    try:
        config_flags.DEFINE_config_dict("config", copy, flag_values=values, sys_argv=arguments)
        values(arguments)
        return values["config"].value.lock()
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(_explain(flat_keys(config), overrides, error), 2) from error


def _explain(keys: Collection[str], overrides: Sequence[str], error: Exception) -> str:
    for given in overrides:
        key = given.removeprefix("--config.").partition("=")[0]
        if key not in keys:
            near = difflib.get_close_matches(key, keys, 3, 0.5)
            near += [k for k in keys if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1] and k not in near]
            return f"unknown config key {key!r}" + (f"; did you mean {' or '.join(near)}?" if near else "")
    if isinstance(error, flags.IllegalFlagValueError):
        return str(error).strip().splitlines()[-1]
    return _cause(error)


def _cause(error: Exception) -> str:
    """The first of a chain of errors in one line."""
    while (cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) is not None:
        error = cause
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: {error.msg}"
    lines = str(error).strip().splitlines() or [""]
    return lines[-1] if isinstance(error, flags.Error | ValueError) else f"{type(error).__name__}: {lines[-1]}"
