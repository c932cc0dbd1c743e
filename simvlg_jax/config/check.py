"""Validation of config values: the range of every number, the allowed names, and keys that depend on each other."""

import math
from collections.abc import Collection, Mapping
from fnmatch import fnmatch
from typing import TypeVar

from ml_collections import ConfigDict

from simvlg_jax.config.defaults import get_eval
from simvlg_jax.utils.errors import UserError

Value = TypeVar("Value")

POSITIVE, BELOW_1 = math.nextafter(0, 1), math.nextafter(1, 0)
ONE_UP, ZERO_UP, SHARE = (1, math.inf), (0, math.inf), (0, BELOW_1)
RANGES = {  # smallest and greatest value of each number; "*" stands for any name
    "seed": (0, 2**32 - 1),
    "vit.max_frames": ZERO_UP,
    "vit.r": ZERO_UP,
    "vit.tokens": ZERO_UP,
    "video.tokens": ZERO_UP,
    "video.max_frames": ZERO_UP,
    "connector.queries": ONE_UP,
    "connector.r": ZERO_UP,
    "connector.inflect": (-1, 1),
    "connector.tokens": ZERO_UP,
    "connector.width": ZERO_UP,
    "connector.position_norm": ZERO_UP,
    "connector.dropout": SHARE,
    "pformer.queries": ONE_UP,
    "pformer.dropout": SHARE,
    "llm.dropout": SHARE,
    "llm.max_text_tokens": ONE_UP,
    "data.synthetic_size.*": ONE_UP,
    "data.max_skipped": (0, 1),
    "data.share": (POSITIVE, 1),
    "data.frames": ZERO_UP,
    "data.block_size": ONE_UP,
    "data.window_blocks": ONE_UP,
    "data.pad_multiple": ZERO_UP,
    "data.pack": (-1, math.inf),
    "data.pack_window": ONE_UP,
    "data.pack_tokens": ZERO_UP,
    "data.workers": ZERO_UP,
    "data.read_threads": ONE_UP,
    "train.batch_size": ONE_UP,
    "train.accumulate": ONE_UP,
    "train.beta": ZERO_UP,
    "train.align": ZERO_UP,
    "train.unguessed": ZERO_UP,
    "train.ema": SHARE,
    "train.beams": (2, math.inf),
    "train.steps": ONE_UP,
    "train.max_minutes": ZERO_UP,
    "train.log_every": ONE_UP,
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
    "evals.*.every": ZERO_UP,
    "evals.*.max_examples": ZERO_UP,
    "evaluate.batch_size": ONE_UP,
    "evaluate.max_new_tokens": ONE_UP,
    "evaluate.min_new_tokens": ZERO_UP,
    "evaluate.num_beams": ONE_UP,
    "evaluate.num_captions": ONE_UP,
    "evaluate.length_penalty": (-math.inf, math.inf),
    "evaluate.temperature": (POSITIVE, math.inf),
    "evaluate.top_k": ZERO_UP,
    "evaluate.top_p": (POSITIVE, 1),
    "evaluate.repetition_penalty": (POSITIVE, math.inf),
}

CHOICES = {
    "dtype": ("float32", "bfloat16"),
    "frozen_dtype": ("float32", "bfloat16", "int8"),
    "frozen_compute": ("", "int8"),
    "data.shuffle": ("global", "blocks"),
    "optimizer.schedule": ("cosine", "staircase"),
    "sentence_encoder.pooling": ("mean", "pooler"),
    "train.negatives": ("softmax", "floored_softmax"),
    "train.mean_over": ("tokens", "captions"),
}


def lookup(table: Mapping[str, Value], key: str, name: str) -> Value:
    """Returns the table entry that a config value names.

    Args:
      key: the config key, for the message.

    Raises:
      UserError (status 2): the table has no such entry. The message lists the existing ones.
    """
    if name not in table:
        raise UserError(f"{key} is {name!r}; it takes {', '.join(map(repr, table))}", 2)
    return table[name]


def flat_keys(config: ConfigDict, prefix: str = "") -> dict[str, object]:
    """Returns {"train.steps": 1000, ...} in the order of the config."""
    flat: dict[str, object] = {}
    for key, value in config.items():
        nested = isinstance(value, ConfigDict)
        flat.update(flat_keys(value, f"{prefix}{key}.") if nested else {prefix + key: value})
    return flat


def check(config: ConfigDict, keys: Collection[str] | None = None) -> None:
    """Raises UserError (status 2) for invalid values. The message gives the fix.

    Args:
      keys: the keys whose range is checked; all by default. Older versions accepted numbers that are now out of range.
    """
    flat = flat_keys(config)
    for key, allowed in CHOICES.items():
        _check_choice(key, flat.get(key), allowed)
    for key in flat if keys is None else keys:
        check_range(key, flat[key])
    scale = config.data.crop_scale
    if len(scale) != 2 or not all(map(is_number, scale)) or not 0 < scale[0] <= scale[1] <= 1:
        raise UserError(f"data.crop_scale is {scale}; it takes two shares of the area, such as (0.5, 1.0)", 2)
    if not all(isinstance(r, int) and r >= 0 for r in config.connector.merges):
        raise UserError(f"connector.merges is {config.connector.merges}; it takes a number of tokens for each layer", 2)
    budgets = config.connector.budgets
    if not all(isinstance(tokens, int) and tokens >= 1 for tokens in budgets) or len(set(budgets)) != len(budgets):
        raise UserError(f"connector.budgets is {budgets}; it takes different numbers of tokens, such as (4, 8, 16)", 2)
    if budgets and config.connector.r:
        raise UserError("connector.r and connector.budgets both set the merges: set r to 0, or budgets to ()", 2)
    _check_prompt("data.prompt", config.data.prompt)
    for name, entry in config.evals.items():
        _check_evaluation(name, entry, config.data, config.evaluate)
    for name, entry in config.data.mixture.items():
        _check_part(f"data.mixture.{name}", entry, config.data)
    if config.train.align and config.task not in ("caption", "blip2_stage1"):
        raise UserError(f"train.align is for the tasks caption and blip2_stage1: with {config.task} set it to 0", 2)
    if config.task != "caption" and (config.train.unguessed or config.train.mean_over != "tokens"):
        raise UserError(
            f"train.unguessed and train.mean_over=captions are for the caption task: leave them out with {config.task}",
            2,
        )
    if config.train.align and config.train.beta:
        raise UserError("train.align and train.beta cannot be combined: set one of them to 0", 2)
    if config.frozen_compute == "int8" and config.frozen_dtype != "int8":
        raise UserError("frozen_compute=int8 multiplies weights that are stored as int8: set frozen_dtype=int8 too", 2)
    if config.vit.max_frames and not config.vit.temporal:
        raise UserError("vit.max_frames is for clips: it needs vit.temporal=True", 2)
    for key in ("r", "tokens"):
        if config.vit[key] and config.vit.temporal:
            raise UserError(f"vit.{key} is for pictures, and vit.temporal=True for clips: set vit.{key}=0", 2)
        if config.vit[key] and config.data.frames:
            raise UserError(f"vit.{key} is for pictures, and data.frames for clips: set vit.{key}=0", 2)
        if config.vit[key] and config.task not in ("caption", "scst"):
            raise UserError(f"vit.{key} is for the tasks caption and scst: the task {config.task} needs vit.{key}=0", 2)
    _check_video(config.video, config.data.frames, config.task)
    for name in ("vit", "video"):
        if 0 < config[name].max_frames < config.data.frames:
            raise UserError(
                f"data.frames={config.data.frames} is more than {name}.max_frames={config[name].max_frames}", 2
            )
    if config.train.batch_size % config.train.accumulate:
        raise UserError("train.batch_size must be a multiple of train.accumulate", 2)
    if config.llm.start_first and config.llm.start_is_target:
        raise UserError("llm.start_first=True needs llm.start_is_target=False: the first token cannot be a target", 2)


def _check_video(video: ConfigDict, frames: int, task: str) -> None:
    """Raises UserError (status 2) for keys of clips that mean nothing."""
    if frames and task not in ("caption", "scst"):
        raise UserError(f"data.frames is for the tasks caption and scst: the task {task} needs data.frames=0", 2)
    if video.frames_as != "mean" and not frames:
        raise UserError(f"video.frames_as={video.frames_as!r} is for clips: set data.frames", 2)
    if video.tokens and video.frames_as != "merged":
        raise UserError("video.tokens is for video.frames_as='merged': set it to 0", 2)
    if video.max_frames and not frames:
        raise UserError("video.max_frames is for clips: set data.frames", 2)


# Keys of config.data that are of the whole pipeline, not of a source of the training data.
WHOLE = ("mixture", "max_skipped", "pad_multiple", "pack", "pack_window", "pack_tokens", "workers", "read_threads")


def _check_evaluation(name: str, entry: ConfigDict, data: ConfigDict, decoding: ConfigDict) -> None:
    """Raises UserError (status 2) for keys of an evaluation that mean nothing, and for invalid values of its data."""
    _check_known(f"evals.{name}", entry, get_eval())
    _check_known(f"evals.{name}.data", entry.data, [key for key in data if key != "mixture"])
    _check_data(f"evals.{name}.data", entry.data)
    _check_known(f"evals.{name}.decoding", entry.decoding, [key for key in decoding if key != "batch_size"])
    for key, value in entry.decoding.items():
        check_range(f"evaluate.{key}", value)


def _check_part(prefix: str, entry: object, data: ConfigDict) -> None:
    """Raises UserError (status 2) for an entry of `data.mixture` that cannot be used."""
    if not isinstance(entry, ConfigDict):
        raise UserError(f"{prefix} is {entry!r}; it takes keys such as weight, name and path", 2)
    _check_known(prefix, entry, ["weight", "split", *(key for key in data if key not in WHOLE)])
    weight = entry.get("weight", 1.0)
    if not is_number(weight) or not 0 < weight < math.inf:
        raise UserError(f"{prefix}.weight is {weight!r}; it takes a number of examples above 0", 2)
    _check_data(prefix, entry)


def _check_known(prefix: str, given: Collection[str], known: Collection[str]) -> None:
    if unknown := sorted(set(given) - set(known)):
        raise UserError(f"unknown config key {prefix}.{unknown[0]!s}; it takes {', '.join(known)}", 2)


def _check_data(prefix: str, entry: ConfigDict) -> None:
    """Checks the values of keys that replace those of config.data."""
    for key, value in flat_keys(entry).items():
        check_range(f"data.{key}", value)
        if f"data.{key}" in CHOICES:
            _check_choice(f"{prefix}.{key}", value, CHOICES[f"data.{key}"])
    _check_prompt(f"{prefix}.prompt", entry.get("prompt", ""))


def _check_choice(key: str, value: object, allowed: Collection[str]) -> None:
    if value not in allowed:
        raise UserError(f"{key} is {value!r}; it takes {', '.join(map(repr, allowed))}", 2)


def _check_prompt(key: str, prompt: str) -> None:
    if prompt.count("{}") > 1:
        raise UserError(f"{key} is {prompt!r}; it takes at most one {{}}, where the question is put", 2)


def is_number(value: object) -> bool:
    """Returns whether a config value is an int or a float, but not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def range_of(key: str) -> tuple[float, float]:
    """Returns the smallest and greatest value of a number. Keys that a config file adds take any number."""
    return next((limits for pattern, limits in RANGES.items() if fnmatch(key, pattern)), (-math.inf, math.inf))


def check_range(key: str, value: object) -> None:
    """Raises UserError (status 2) if a number of the config is outside its range in RANGES."""
    if not is_number(value):
        return
    low, high = range_of(key)
    if low <= value <= high and math.isfinite(value):
        return
    least = "above 0" if low == POSITIVE else f"at least {low}"
    most = {math.inf: "", BELOW_1: " and below 1"}.get(high, f" and at most {high}")
    raise UserError(f"{key} is {value}; it must be {least}{most}", 2)
