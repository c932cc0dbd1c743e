"""Compiles the training step for a TPU slice without having one: does it fit, and how fast can it be at most?

    pip install libtpu
    python -m simvlg_jax.train_compile --config configs/pretrain_image.py:llm=opt2.7b --topology v5e:4x4
    python -m simvlg_jax.train_compile --config configs/pretrain_image.py:llm=vicuna7b --topology v5p:2x2x2 --slices 2

The step is the one that training runs, compiled by the real TPU compiler for the longest texts. Its memory is what the
compiler says; its time is a roofline, which no run reaches. On few cores a full-size recipe takes many minutes, with
--effort O0 one or two, and nearly the same memory. Weights and data are not needed.

Exit status: 0 fits, 3 does not fit, 1 failed, 2 asked for wrongly.
"""

import argparse
import json
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
    parser.add_argument("--slices", type=int, default=1, help="how many such slices")
    parser.add_argument("--effort", choices=("O0", "O1", "O2", "O3"), default="", help="the compiler's; default: full")
    parser.add_argument("--search", choices=("batch",), help="the largest batch that fits, instead of the config's")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    arguments, overrides = parser.parse_known_args()
    if arguments.slices < 1:
        raise UserError("--slices must be at least 1", 2)
    config = load_config(arguments.config, overrides)
    result = run(config, arguments)
    print(json.dumps(result.as_dict()) if arguments.json else describe(result))
    return 0 if result.fits else 3


def run(config: ConfigDict, arguments: argparse.Namespace) -> "Forecast":
    """The forecast that was asked for."""
    topology = parse_topology(arguments.topology)
    os.environ.update(COMPILE_ONLY)
    from simvlg_jax.forecast import forecast as ahead
    from simvlg_jax.parallel import mesh as meshes

    def forecast_of(batch: int) -> ahead.Forecast:
        sized = config.copy_and_resolve_references()
        with sized.unlocked():
            sized.train.batch_size = batch
        result = ahead.forecast(arguments.config, sized, arguments.topology, arguments.slices, arguments.effort, say)
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
    """A forecast in words, for a person."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in f.mesh.items())
    slices = f"{f.slices} slices of " if f.slices > 1 else ""
    lines = [
        f"{f.config} on {slices}{f.topology}: {f.chips} chips ({mesh}), batch {f.global_batch} "
        f"({f.global_batch / f.chips:g} a chip) in {f.micro_batches} micro-batch(es)"
    ]
    if f.peak_bytes is None:
        lines += [f"memory a chip: more than the {gb(f.hbm_bytes)} there are; fits: no"]
        lines += ["try more micro-batches (--config.train.accumulate), a greater mesh.tensor, or --search batch"]
    else:
        lines += [
            f"memory a chip: arguments {gb(f.argument_bytes)}, temporaries {gb(f.temp_bytes)}, "
            f"peak {gb(f.peak_bytes)} of {gb(f.hbm_bytes)}; fits: {'yes' if f.fits else 'no'}",
            f"work a chip: {f.tflop_per_step:.4g} TFLOP in {f.compute_s:.4g} s, memory traffic {f.memory_s:.4g} s, "
            f"communication {f.communication_s:.3g} s ({f.communication_s / f.roofline_step_s:.1%} of the step)",
            f"roofline: {f.roofline_step_s:.4g} s a step, {f.images_per_s:.5g} images/s at most",
            *(
                f"collective: {c['op']} x {c['count']} over {c['group']} chips, {c['bytes'] / 1e6:.4g} MB a step"
                for c in f.collectives
            ),
        ]
    return "\n".join([*lines, f"compiled in {f.compile_s:.0f} s"])


def gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


if __name__ == "__main__":
    run_verb(main)
