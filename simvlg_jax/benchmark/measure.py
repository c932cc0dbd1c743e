"""Measures the training step of a config: what `python -m simvlg_jax.benchmark` prints, as one dictionary."""

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from simvlg_jax.benchmark import captioning, setting, step
from simvlg_jax.benchmark.against_torch import against_torch, check
from simvlg_jax.benchmark.peaks import peak_flops, utilization
from simvlg_jax.benchmark.setting import Setting
from simvlg_jax.benchmark.step_parts import Cost, Parts
from simvlg_jax.config.load import override
from simvlg_jax.evaluation.caption_model import CaptionModel
from simvlg_jax.tasks import params as partition
from simvlg_jax.utils.errors import UserError

CONTAINED = "merge"  # the part that is in another one


class Options(NamedTuple):
    """What to measure besides the step; see `__main__`.

    Attributes:
      steps: a time is the median of so many calls, and a round of a comparison takes so many steps.
      rounds: of comparisons and of decoding.
    """

    steps: int = 10
    rounds: int = 5
    trace: Path | None = None
    decode: bool = False
    against: bool = False
    torch_compile: bool = False


def measure(config: ConfigDict, options: Options, say: Callable[[str], None] = lambda message: None) -> dict:
    """Returns all that is measured: numbers, strings, lists and dictionaries of them.

    Raises:
      UserError: the config has no captions, data or weights cannot be used, or PyTorch does not give the same loss.
    """
    if options.against:
        check(config)
    if options.decode and config.data.frames:
        raise UserError("--decode captions pictures, and the config's data are clips: leave it out", 2)
    if options.trace:
        step.check_folder(options.trace)
    say("drawing batches, reading and initialising the weights")
    chosen = setting.prepare(config, options.steps)
    batch = setting.put(chosen)
    say("compiling the step")
    compiled = step.compile_step(chosen, batch)
    seconds = compiled.seconds(options.steps)
    memory, memory_of = step.memory()  # before other programs run
    found = {}
    if options.against:
        say("comparing with PyTorch")
        kwargs = dict(steps=options.steps, rounds=options.rounds, compiled=options.torch_compile, say=say)
        found["against"] = against_torch(compiled, **kwargs)
    if options.decode:
        say("captioning")
        found["decode"] = decode(chosen, options.rounds)
    say("recording a forward pass")
    parts = Parts(chosen, batch, options.steps)
    costs = parts.measure(say)
    if options.trace:
        step.write_trace(compiled, options.trace)
        found["trace"] = step.how_to_open(options.trace)
    device = jax.devices()[0]
    whole, peak = Cost(seconds, compiled.flops), peak_flops(device.device_kind)
    together = sum((cost for name, cost in costs.items() if name != CONTAINED), Cost(0.0, 0))
    return {
        "device": {
            "kind": device.device_kind,
            "platform": device.platform,
            "count": chosen.mesh.size,
            "mesh": dict(chosen.mesh.shape),
            "jax": jax.__version__,
        },
        "data": ", ".join(entry.get("name", config.data.name) for entry in config.data.mixture.values())
        or config.data.name,
        "frozen_weights": dict(chosen.task.sources),
        "dtype": config.dtype,
        "frozen_dtype": config.frozen_dtype,
        "batch": {
            "images": chosen.images,
            "micro_batches": config.train.accumulate,
            "text_shape": list(batch["caption_ids"].shape),
            "soft_prompt_tokens": parts.prefix,
            "padding_share": setting.padding_share(chosen.batches, parts.prefix),
            "batches": len(chosen.batches),
        },
        "parts": {"host input": written(Cost(chosen.input_seconds, 0))}
        | {name: written(cost) for name, cost in costs.items()},
        "sum_of_parts": written(together),
        "rest": written(whole - together),
        "step": written(whole)
        | {
            "images_per_s": chosen.images / seconds,
            "mfu": utilization(whole.flops, seconds, peak, chosen.mesh.size),
            "peak_tflops": peak and peak / 1e12,
            "memory_gb": memory,
            "memory_of": memory_of,
            "compile_s": compiled.compile_seconds,
        },
        **found,
    }


def written(cost: Cost) -> dict[str, float]:
    return {"ms": 1e3 * cost.seconds, "tflop": cost.flops / 1e12}


def decode(chosen: Setting, rounds: int) -> dict[str, float]:
    """Returns the captions per second of the measured batch, by way of decoding."""
    images, speeds = chosen.host_batch["image"], {}
    params = partition.join(chosen.frozen, chosen.state.params)
    for name, beams in captioning.DECODING.items():
        model = CaptionModel(override(chosen.config, [f"--config.evaluate.num_beams={beams}"]), chosen.task, params)
        (measured,) = captioning.in_turns([captioning.our_writer(model, len(images))], images, len(images), rounds)
        speeds[name] = median(speed for speed, _ in measured)
    return speeds
