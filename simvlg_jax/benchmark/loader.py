"""Compares the speed of the data pipeline with that of torch's DataLoader and the same transforms.

    python -m simvlg_jax.benchmark.loader [--reduced] [--count 2000] [--size 640x480] [--dir FOLDER]

Makes synthetic photographs (JPEG, quality 90, 4:2:0), measures the loaders in turns and prints pictures per second, the
ratio to torch and the time of each stage. All pictures are read from the disk's cache, decoded, cropped, resized to
224 x 224 and batched with their captions. Without torch it measures ours alone.
"""

import argparse
import functools
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from simvlg_jax.benchmark.photos import write_photos
from simvlg_jax.config.defaults import get_config
from simvlg_jax.data import transforms
from simvlg_jax.data.batch import BatchSpec, Pictures, TextSpec
from simvlg_jax.data.batching import Example, collate
from simvlg_jax.data.pipeline import make_train_iterator
from simvlg_jax.data.sources import Source, load_source
from simvlg_jax.data.text import CaptionText, character_tokenizer
from simvlg_jax.utils.errors import UserError, run_verb

SIDE, TOKENS = 224, 32
STAGES = 200  # pictures whose stages are timed


def layout() -> BatchSpec:
    text = CaptionText(character_tokenizer(), start_id=1, end_id=2, pad_id=0, max_tokens=TOKENS, start_is_target=False)
    return BatchSpec(Pictures(SIDE), {"caption": TextSpec(TOKENS, predicted=True, load=lambda: text)})


def data_config(folder: Path, **fields) -> ConfigDict:
    config = get_config().data
    config.update({"name": "folder", "path": str(folder), "read_threads": 2, **fields})
    return config


def contenders(folder: Path, batch_size: int, reduced: bool) -> dict[str, Callable[[], Iterator]]:
    """Name -> what starts the loader; torch's is the last."""
    spec = layout()
    source = load_source(data_config(folder), "train", training=True)

    def ours(**fields) -> Callable[[], Iterator]:
        config = data_config(folder, **fields)
        return functools.partial(make_train_iterator, config, source, spec, batch_size=batch_size, seed=0)

    loaders = {"ours, 2 threads": ours(), "ours, 2 workers": ours(workers=2, read_threads=1)}
    if reduced:
        loaders["ours, 2 threads, reduced"] = ours(reduced_decode=True)
    if importlib.util.find_spec("torch"):
        from simvlg_jax.benchmark import torch_loader

        pairs = torch_loader.Pairs(source, spec.texts["caption"].encoder, SIDE, tuple(data_config(folder).crop_scale))
        loaders["torch, 2 workers"] = functools.partial(iter, torch_loader.make_loader(pairs, batch_size, workers=2))
    return loaders


def speed(start: Callable[[], Iterator], batch_size: int, batches: int, warm_up: int) -> float:
    """Pictures per second of a loader that has just been started, after its first `warm_up` batches."""
    iterator = start()
    for _ in range(warm_up):
        next(iterator)
    began = time.perf_counter()
    for _ in range(batches):
        next(iterator)
    seconds = time.perf_counter() - began
    if hasattr(iterator, "close"):
        iterator.close()
    return batches * batch_size / seconds


def measure(folder: Path, *, batch_size: int, batches: int, rounds: int, reduced: bool) -> dict[str, list[float]]:
    """Name of a loader -> pictures per second in each round. Within a round the loaders take turns."""
    loaders = contenders(folder, batch_size, reduced)
    warm_up = 6  # what two threads or workers have read ahead
    needed = (batches + warm_up) * batch_size
    source = load_source(data_config(folder), "train", training=True)
    if len(source) < needed:
        raise UserError(f"one round draws {needed} pictures from {len(source)}: raise --count or lower --batches")
    speeds: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(rounds):
        for name, start in loaders.items():
            speeds[name].append(speed(start, batch_size, batches, warm_up))
    return speeds


def speed_table(speeds: dict[str, list[float]]) -> str:
    """Median, ratio to the last loader in the same round, and the smallest and greatest ratio."""
    *_, last = speeds
    lines = [f"{'':26}{'pictures/s':>12}{'ratio':>8}   ratio in each round"]
    for name, values in speeds.items():
        ratios = [value / base for value, base in zip(values, speeds[last], strict=True)]
        line = f"{name:26}{statistics.median(values):12.0f}{statistics.median(ratios):8.2f}"
        lines.append(f"{line}   {min(ratios):.2f} to {max(ratios):.2f}")
    return "\n".join(lines)


def seconds_each(function: Callable[[int], object], count: int, rounds: int = 3) -> float:
    """The fastest round of calling a function with 0 .. count - 1, in seconds per call."""
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        for number in range(count):
            function(number)
        times.append((time.perf_counter() - began) / count)
    return min(times)


def stage_table(source: Source, scale: tuple[float, float]) -> str:
    """Milliseconds per picture of each stage on one thread, with Pillow alone and with ours.

    Raises:
      UserError: a view is not what Pillow gives.
    """
    count = min(STAGES, len(source))
    data = [source[n]["image"] for n in range(count)]
    pictures, arrays = [transforms.decode(d) for d in data], [transforms.pixels(d) for d in data]
    boxes = [transforms.crop_box(*p.size, scale, np.random.default_rng(n)) for n, p in enumerate(pictures)]

    def pillow(n: int) -> np.ndarray:
        return np.asarray(pictures[n].crop(boxes[n]).resize((SIDE, SIDE), Image.Resampling.BICUBIC))

    def ours(n: int) -> np.ndarray:
        return transforms.augment(arrays[n], SIDE, scale, False, np.random.default_rng(n))

    views = [ours(n) for n in range(count)]
    if different := [n for n in range(count) if not np.array_equal(views[n], pillow(n))]:
        raise UserError(
            f"{len(different)} of {count} views are not Pillow's: install Pillow 13, whose resizing ours follows"
        )
    spec = layout()
    examples = [Example(view, spec.encode(source[n]["caption"])) for n, view in enumerate(views)]
    rows = {
        "decode": (lambda n: transforms.decode(data[n]), lambda n: transforms.pixels(data[n])),
        "crop and resize": (pillow, ours),
    }
    lines = [f"{'ms per picture':26}{'Pillow':>12}{'ours':>8}"]
    for name, functions in rows.items():
        times = [1e3 * seconds_each(function, count) for function in functions]
        lines.append(f"{name:26}{times[0]:12.2f}{times[1]:8.2f}")
    batched = 1e3 * seconds_each(lambda n: collate(examples, spec=spec, multiple=4), 1) / count
    lines.append(f"{'collate':26}{'':12}{batched:8.2f}")
    return "\n".join([*lines, f"all {count} views have Pillow's bytes"])


def reduced_difference(source: Source, scale: tuple[float, float]) -> str:
    """One line: the share of views that are decoded at a reduced size, and their difference to the full decode."""
    count = min(STAGES, len(source))
    squares, means = [], []
    for n in range(count):
        image = source[n]["image"]
        full, small = (
            transforms.view(image, SIDE, scale, True, np.random.default_rng(n), reduced=reduced).astype(float)
            for reduced in (False, True)
        )
        if not np.array_equal(full, small):
            squares.append(np.square(full - small).mean())
            means.append(np.abs(full - small).mean())
    if not means:
        return f"none of {count} crops is large enough to be decoded at a reduced size"
    decibel = 10 * np.log10(255**2 / np.mean(squares))
    return (
        f"reduced: {len(means) / count:.0%} of the views are decoded smaller; these differ by {np.mean(means):.2f} "
        f"of 255 on average, PSNR {decibel:.1f} dB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m simvlg_jax.benchmark.loader",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dir", type=Path, help="folder that keeps the pictures; default: a temporary one")
    parser.add_argument("--count", type=int, default=2000, help="number of pictures")
    parser.add_argument("--size", default="640x480", help="width x height of the pictures")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=16, help="batches that are timed in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--reduced", action="store_true", help="also measure data.reduced_decode")
    args = parser.parse_args()
    try:
        width, height = map(int, args.size.split("x"))
        if min(width, height, args.count, args.batch_size, args.batches, args.rounds) < 1:
            raise ValueError
    except ValueError:
        raise UserError("--size takes WIDTHxHEIGHT, and all numbers must be at least 1", 2) from None
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.dir or Path(temporary)
        mean = write_photos(folder, args.count, (width, height))
        print(
            f"{args.count} synthetic JPEGs of {width} x {height}, {mean / 1000:.0f} kB each, "
            f"in batches of {args.batch_size}"
        )
        config = data_config(folder)
        source, scale = load_source(config, "train", training=True), tuple(config.crop_scale)
        print(stage_table(source, scale), flush=True)
        if args.reduced:
            print(reduced_difference(source, scale), flush=True)
        if not importlib.util.find_spec("torch"):
            print("torch is not installed: ours is measured alone")
        speeds = measure(
            folder, batch_size=args.batch_size, batches=args.batches, rounds=args.rounds, reduced=args.reduced
        )
        print(speed_table(speeds))


if __name__ == "__main__":
    run_verb(main)
