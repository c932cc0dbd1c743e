"""Times captioning beside the PyTorch form of the same model, in turns, and compares the captions.

    python -m simvlg_jax.benchmark.captioning --example [--split test] [--pictures 64] [--batch_size 16] [--rounds 5]

Both get the same pixels in memory. PyTorch runs the model that `to_torch --format hf` writes, by transformers'
`generate`. Both decode greedily and with 5 beams. The ratios are of images per second in each round.
"""

import argparse
import importlib.util
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from simvlg_jax.benchmark.timing import compared, cores
from simvlg_jax.config.arguments import add_model_arguments, model_folder
from simvlg_jax.config.load import override
from simvlg_jax.config.saved import read_config
from simvlg_jax.utils.errors import UserError, run_verb

Write = Callable[[np.ndarray], list[str]]  # pictures (B, S, S, 3) uint8 -> their captions
DECODING = {"greedy": 1, "5 beams": 5}


def pictures_of(model, split: str, count: int) -> np.ndarray:
    """The first pictures of a split of the model's data: (P, S, S, 3) uint8."""
    from simvlg_jax.data.sources import load_source
    from simvlg_jax.data.views import view_of

    source, view = load_source(model.config.data, split), view_of(model.task.batch.pictures)
    return np.stack([view.evaluate(source[index]) for index in range(min(count, len(source)))])


def torch_writer(model, folder: Path, num_beams: int) -> Write:
    """The PyTorch form of a model, from a folder that is written for it."""
    import jax
    import torch
    from transformers import AutoModel, AutoTokenizer

    from simvlg_jax.convert import stacking
    from simvlg_jax.huggingface.export import write_hf

    text = model.task.batch.texts["caption"].encoder
    write_hf(folder, model.task.model, stacking.stack_all(jax.device_get(model.params)), text, model.config)
    torch.set_num_threads(cores())
    exported = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    normalize = jax.jit(model.task.model.vit.normalize)

    def write(images: np.ndarray) -> list[str]:
        pixels = torch.from_numpy(np.array(normalize(images)).transpose(0, 3, 1, 2))
        ids = exported.generate(pixels, num_beams=num_beams)
        return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in ids]

    return write


def speed(write: Write, images: np.ndarray, batch_size: int) -> tuple[float, list[str]]:
    """Returns images per second and the captions."""
    start = time.perf_counter()
    captions = [text for at in range(0, len(images), batch_size) for text in write(images[at : at + batch_size])]
    return len(images) / (time.perf_counter() - start), captions


def in_turns(writers: list[Write], images: np.ndarray, batch_size: int, rounds: int) -> list[list[tuple]]:
    """Returns of each writer what `speed` returns in each round, after a batch that does not count."""
    for write in writers:
        write(images[:batch_size])
    measured = [[speed(write, images, batch_size) for write in writers] for _ in range(rounds)]
    return [list(each) for each in zip(*measured, strict=True)]


def report(name: str, ours: list[float], theirs: list[float], equal: int, pictures: int) -> str:
    """One line: images per second of both, their ratios, and how many captions are equal."""
    return f"{name:8} {compared(ours, theirs)}; {equal} of {pictures} captions equal"


def our_writer(model, batch_size: int) -> Write:
    return lambda images: model.captions(list(images), batch_size=batch_size)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m simvlg_jax.benchmark.captioning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser)
    parser.add_argument("--split", default="test")
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    arguments, overrides = parser.parse_known_args()
    if min(arguments.pictures, arguments.batch_size, arguments.rounds) < 1:
        raise UserError("--pictures, --batch_size and --rounds must be at least 1", 2)
    if importlib.util.find_spec("torch") is None:
        raise UserError("the comparison needs PyTorch: pip install torch")

    from simvlg_jax.evaluation.caption_model import CaptionModel
    from simvlg_jax.training.restore import restore_run

    folder = model_folder(arguments)
    for name, beams in DECODING.items():
        flags = [*overrides, f"--config.evaluate.num_beams={beams}"]
        run = restore_run(override(read_config(folder), flags), folder, captions=True)
        model = CaptionModel(run.config, run.task, run.params)
        images = pictures_of(model, arguments.split, arguments.pictures)
        batch_size = min(arguments.batch_size, len(images))
        images = images[: len(images) // batch_size * batch_size]  # whole batches: neither fills up rows
        with tempfile.TemporaryDirectory() as exported:
            theirs = torch_writer(model, Path(exported), beams)
            measured = in_turns([our_writer(model, batch_size), theirs], images, batch_size, arguments.rounds)
        (_, one), (_, other) = (rounds[0] for rounds in measured)
        equal = sum(ours == theirs for ours, theirs in zip(one, other, strict=True))
        speeds = [[run[0] for run in rounds] for rounds in measured]
        print(report(name, *speeds, equal, len(images)), flush=True)


if __name__ == "__main__":
    run_verb(main)
