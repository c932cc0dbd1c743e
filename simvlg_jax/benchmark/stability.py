"""Counts the pictures whose merges or captions change with the batch size or the number of devices.

    python -m simvlg_jax.benchmark.stability --example [--split val,test,novel] [--pictures 400]
    python -m simvlg_jax.benchmark.stability --workdir runs/openmoji --batch_sizes 1,8,64 --devices 1,8

Programs for other batch sizes round otherwise. Where two pairs of tokens are equally similar to the last bits, rounding
decides which pair merges. Everything is compared with the first number of devices and the largest batch. On a CPU the
devices are virtual. `--config.evaluate.num_beams=5` and the like set how captions are decoded.
"""

import argparse
import functools
import os
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from simvlg_jax.config import defaults
from simvlg_jax.config.arguments import add_checkpoint_argument, add_model_arguments, model_folder
from simvlg_jax.config.load import override
from simvlg_jax.config.saved import read_config
from simvlg_jax.decoding.settings import decoding_of
from simvlg_jax.evaluation.captioner import Captioner
from simvlg_jax.evaluation.evaluator import EvalData
from simvlg_jax.parallel.collectives import gather
from simvlg_jax.training.restore import Run, restore_run
from simvlg_jax.utils.errors import UserError, run_verb


class Outcome(NamedTuple):
    """What one program made of the pictures: maps (P, N) int32, which token each patch became part of, and captions."""

    maps: np.ndarray
    captions: list[str]


def outcome(run: Run, config: ConfigDict, splits: list[str], pictures: int, batch_size: int) -> Outcome:
    """Captions the first `pictures` of the splits, in batches of one size."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.evaluate.batch_size = batch_size
    captioner = Captioner(run.task.model, run.task.batch.texts["caption"].encoder, decoding_of(config))
    maps: list[np.ndarray] = []
    captions: list[str] = []
    for split in splits:
        if left := pictures - len(captions):
            entry = defaults.get_eval()
            entry.update(split=split, max_examples=left)
            for batch in EvalData(entry, run.task, config, run.mesh):
                output = captioner(run.params, batch["image"])
                if output.source_map is None:
                    raise UserError("the connector of this model merges no tokens, so there is nothing to compare")
                real = gather(batch["index"]) >= 0
                maps += list(gather(output.source_map)[real])
                written = captioner.decode(gather(output.ids))
                captions += [texts[0] for texts, counts in zip(written, real, strict=True) if counts]
    return Outcome(np.stack(maps), captions)


def compare(found: Outcome, wanted: Outcome) -> str:
    """Returns in words how many pictures differ."""
    merges = int((found.maps != wanted.maps).any(1).sum())
    captions = sum(one != other for one, other in zip(found.captions, wanted.captions, strict=True))
    return f"{merges} merge otherwise, {captions} captions differ"


def numbers(flag: str, given: str) -> list[int]:
    """Returns the positive integers of "1,4,16"."""
    if not all(number.isdecimal() and int(number) for number in given.split(",")):
        raise UserError(f"{flag} takes numbers such as 1,4,16, not {given!r}", 2)
    return [int(number) for number in given.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m simvlg_jax.benchmark.stability",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser)
    add_checkpoint_argument(parser)
    parser.add_argument("--split", default="val", help="comma-separated")
    parser.add_argument("--pictures", type=int, default=400)
    parser.add_argument("--batch_sizes", default="1,4,16")
    parser.add_argument("--devices", default="1,4")
    arguments, overrides = parser.parse_known_args()
    sizes, devices = numbers("--batch_sizes", arguments.batch_sizes), numbers("--devices", arguments.devices)
    if arguments.pictures < 1:
        raise UserError("--pictures must be at least 1", 2)
    virtual = f"--xla_force_host_platform_device_count={max(devices)}"  # only a CPU's devices are virtual
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {virtual}"
    folder = model_folder(arguments)
    config = read_config(folder)

    @functools.cache
    def model(count: int) -> tuple[Run, ConfigDict]:
        one_axis = [f"--config.mesh.data={count}", "--config.mesh.fsdp=1", "--config.mesh.tensor=1"]
        own = override(config, ["--config.mesh.preset=", *one_axis, *overrides])
        return restore_run(own, folder, arguments.checkpoint, captions=True), own

    layouts = [(count, size) for count in devices for size in sorted(sizes, reverse=True) if size % count == 0]
    if not layouts:
        raise UserError("no --batch_sizes is a multiple of one of --devices", 2)
    wanted = None
    for count, size in layouts:
        found = outcome(*model(count), arguments.split.split(","), arguments.pictures, size)
        wanted = wanted or found
        print(f"{len(found.maps)} pictures, {count} devices, batch {size}: {compare(found, wanted)}", flush=True)


if __name__ == "__main__":
    run_verb(main)
