"""What a comparison trains: arms that differ in some settings, each with several seeds, from a config of its own.

    config.base = "configs/openmoji.py"      # the config of all runs
    config.settings = ("train.steps=400",)    # what all runs change of it
    config.arms.pool = ConfigDict({"stages": (("connector.type=pool", "connector.tokens=8"),)})

An arm has one stage or several, which train one after the other. A stage is a tuple of settings; "{previous}" in one
stands for the workdir of the stage before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ml_collections import ConfigDict

from simvlg_jax.config.load import change, load_config, read_file
from simvlg_jax.utils.errors import UserError

PREVIOUS = "{previous}"


def get_config() -> ConfigDict:
    """Returns a new, unlocked config of a comparison with every key at its default."""
    config = ConfigDict()
    config.base = "configs/openmoji.py"
    config.settings = ()
    config.arms = ConfigDict()
    config.baseline = ""  # the arm whose score the others are timed to
    config.only = ()  # names of the arms that are trained; (): all
    config.seeds = (0, 1, 2)
    # Each stage of each arm takes the value of `key` with the lowest validation loss after `steps` steps with the first
    # seed. Without values nothing is searched.
    config.search = ConfigDict(dict(key="optimizer.lr", values=(), steps=100))
    config.splits = ("test",)  # scored at the end; (): what simvlg_jax.evaluate scores without --split
    return config


def get_arm(*stages: Sequence[str], tokens: Sequence[int] = ()) -> ConfigDict:
    """Returns an entry of `config.arms`.

    Args:
      stages: the settings of each stage.
      tokens: other numbers of visual tokens (`connector.tokens`) that the trained model is scored with.
    """
    return ConfigDict(dict(stages=tuple(map(tuple, stages)), tokens=tuple(tokens)))


@dataclass(frozen=True)
class Arm:
    """One of the compared methods; fields as in `get_arm`."""

    name: str
    stages: tuple[tuple[str, ...], ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Search:
    """The key whose value each stage chooses for itself; fields as in `get_config`."""

    key: str
    values: tuple[float, ...]
    steps: int

    def flag(self, value: float) -> str:
        """Returns the override that sets the key."""
        return f"--config.{self.key}={value!r}"


@dataclass(frozen=True)
class Study:
    """A comparison; fields as in `get_config`, but for `only`."""

    base: str
    settings: tuple[str, ...]
    arms: tuple[Arm, ...]
    baseline: str
    seeds: tuple[int, ...]
    search: Search
    splits: tuple[str, ...]

    def flags(self, arm: Arm, stage: int, previous: str = PREVIOUS) -> list[str]:
        """Returns the overrides of `base` in a stage. `previous` is the workdir of the stage before it."""
        settings = (*self.settings, *arm.stages[stage])
        return [f"--config.{setting.replace(PREVIOUS, previous)}" for setting in settings]

    def config(self, arm: Arm, stage: int) -> ConfigDict:
        """Returns the config of a stage, with "{previous}" in it."""
        return load_config(self.base, [*self.flags(arm, stage), *map(self.search.flag, self.search.values[:1])])


def read_study(spec: str, overrides: Sequence[str]) -> Study:
    """Reads a comparison and checks the config of every stage, before anything is trained.

    Raises:
      UserError (status 2): no such file, an unknown key, or settings that `base` does not have.
    """
    given, config = read_file(spec), get_config()
    unknown = set(given) - set(config)
    if unknown:
        raise UserError(
            f"config {spec}: {', '.join(sorted(unknown))} is no key of a comparison ({', '.join(config)})", 2
        )
    config.update(given)
    config = change(config.lock(), overrides)
    chosen = config.only or tuple(config.arms)
    missing = [name for name in (*chosen, *([config.baseline] if config.baseline else [])) if name not in config.arms]
    if missing or not chosen:
        raise UserError(f"config {spec}: there is no arm {', '.join(missing)}; it has {', '.join(config.arms)}", 2)
    if not config.seeds or config.search.steps < 1:
        raise UserError(f"config {spec}: seeds need one entry or more, and search.steps is 1 or more", 2)
    arms = tuple(Arm(name, config.arms[name].stages, config.arms[name].tokens) for name in chosen)
    plain = {key: config[key] for key in ("base", "settings", "baseline", "seeds", "splits")}
    study = Study(arms=arms, search=Search(**config.search), **plain)
    for arm in arms:
        if not arm.stages or PREVIOUS in "".join(arm.stages[0]):
            raise UserError(f"config {spec}: arm {arm.name} needs a first stage, without {PREVIOUS}", 2)
        for stage in range(len(arm.stages)):
            study.config(arm, stage)
    return study
