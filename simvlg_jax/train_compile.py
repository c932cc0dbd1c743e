"""Compiles the training step ahead of time (AOT) for a TPU slice: does it fit, and how fast could it be?

    pip install libtpu
    python -m simvlg_jax.train_compile --config configs/pretrain_image.py:llm=opt2.7b --topology v5e:4x4
    python -m simvlg_jax.train_compile --config configs/pretrain_image.py:llm=vicuna7b --topology v5p:2x2x2 --slices 2

No TPU is needed, and neither are weights or data. The real TPU compiler compiles the step that training runs, for
packed captions of --text_tokens on average, or with data.pack=0 for the longest ones. The memory is the compiler's
figure. The time is a roofline, a lower bound that no run reaches. On few cores a full-size recipe compiles for many
minutes; with --effort O0 for one or two, with nearly the same memory. Of the task scst it is the step alone, without
the beam search before it.

Exit status: 0 fits, 3 does not fit, 1 failed, 2 invalid arguments or config.
"""

import argparse
import json
import math
import os
import sys
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from simvlg_jax.config.arguments import config_parser
from simvlg_jax.config.load import load_config
from simvlg_jax.forecast.chips import COMPILE_ONLY, parse_topology
from simvlg_jax.utils.errors import UserError, run_verb

if TYPE_CHECKING:
    from simvlg_jax.forecast.forecast import Forecast


def main() -> int:
    parser = config_parser(__doc__, prog="python -m simvlg_jax.train_compile")
    parser.add_argument("--topology", required=True, help="chip and sides of the slice: v5e:4x4, v4:2x2x4, v5p:2x2x2")
    parser.add_argument("--slices", type=int, default=1, help="number of such slices")
    parser.add_argument("--effort", choices=("O0", "O1", "O2", "O3"), default="", help="of the compiler; default: full")
    parser.add_argument("--search", choices=("batch",), help="search the largest batch that fits")
    parser.add_argument(
        "--text_tokens", type=float, default=14.0, help="mean length of a caption with start and end [14, COCO's]"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    arguments, overrides = parser.parse_known_args()
    if arguments.slices < 1:
        raise UserError("--slices must be at least 1", 2)
    if not 0 < arguments.text_tokens < math.inf:
        raise UserError("--text_tokens must be above 0", 2)
    config = load_config(arguments.config, overrides)
    result = run(config, arguments)
    print(json.dumps(result.as_dict()) if arguments.json else describe(result))
    return 0 if result.fits else 3


def run(config: ConfigDict, arguments: argparse.Namespace) -> "Forecast":
    """Returns the forecast of the config, or with --search of the largest batch that fits."""
    topology = parse_topology(arguments.topology)
    os.environ.update(COMPILE_ONLY)
    from simvlg_jax.forecast import forecast as ahead
    from simvlg_jax.parallel import mesh as meshes

    def forecast_of(batch: int) -> ahead.Forecast:
        sized = config.copy_and_resolve_references()
        with sized.unlocked():
            sized.train.batch_size = batch
        result = ahead.forecast(
            arguments.config,
            sized,
            arguments.topology,
            arguments.slices,
            arguments.effort,
            say,
            arguments.text_tokens,
        )
        if arguments.search:
            say(f"batch {batch}: {'fits' if result.fits else 'does not fit'}")
        return result

    if not arguments.search:
        return forecast_of(config.train.batch_size)
    mesh = ahead.topology_mesh(config, topology, arguments.slices)
    unit = meshes.batch_shards(mesh) * config.train.accumulate
    return ahead.largest_batch(forecast_of, unit, config.train.batch_size)


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def describe(f: "Forecast") -> str:
    """Returns a forecast as readable text."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in f.mesh.items())
    slices = f"{f.slices} slices of " if f.slices > 1 else ""
    lines = [
        f"{f.config} on {slices}{f.topology}: {f.chips} chips ({mesh}), batch {f.global_batch} "
        f"({f.global_batch / f.chips:g} per chip) in {f.micro_batches} micro-batch(es)"
    ]
    if f.padding is not None:
        lines += [f"padding: {f.padding:.1%} of the language model's tokens, for captions of {f.text_tokens:g} tokens"]
    if f.peak_bytes is None:
        lines += [f"memory per chip: more than the available {gb(f.hbm_bytes)}; fits: no"]
        lines += ["try more micro-batches (--config.train.accumulate), a larger mesh.tensor, or --search batch"]
    else:
        work = f"{f.tflop_per_step:.4g} TFLOP" + (
            f" and {f.int8_top_per_step:.4g} TOP of int8" * (f.int8_top_per_step > 0)
        )
        lines += [
            f"memory per chip: arguments {gb(f.argument_bytes)}, temporaries {gb(f.temp_bytes)}, "
            f"peak {gb(f.peak_bytes)} of {gb(f.hbm_bytes)}; fits: {'yes' if f.fits else 'no'}",
            f"work per chip: {work} in {f.compute_s:.4g} s, memory traffic {f.memory_s:.4g} s, "
            f"communication {f.communication_s:.3g} s ({f.communication_s / f.roofline_step_s:.1%} of the step)",
            f"roofline: {f.roofline_step_s:.4g} s per step, {f.images_per_s:.5g} images/s at most",
            *(
                f"collective: {c['op']} x {c['count']} over {c['group']} chips, {c['bytes'] / 1e6:.4g} MB per step"
                for c in f.collectives
            ),
        ]
    return "\n".join([*lines, f"compiled in {f.compile_s:.0f} s"])


def gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


if __name__ == "__main__":
    run_verb(main)
