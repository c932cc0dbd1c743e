"""Captions pictures or clips, or answers a question about each. Gives one JSON line for each, in the given order.

    python -m simvlg_jax.caption --example picture.png folder/
    python -m simvlg_jax.caption --workdir runs/openmoji --prompt "a" picture.png
    python -m simvlg_jax.caption --workdir runs/openmoji --config.evaluate.num_beams=5 picture.png
    python -m simvlg_jax.caption --workdir runs/vqa --question "what colour is it?" picture.png
    python -m simvlg_jax.caption --workdir runs/openmoji --output captions.jsonl folder/
    python -m simvlg_jax.caption --workdir runs/msrvtt clip.mp4

The lines, {"image": ..., "caption": ...} or {"image": ..., "question": ..., "answer": ...}, go to standard output. With
`evaluate.num_captions` above 1, "captions" or "answers" has all texts (samples, or the best beams). The line of an
unreadable picture has an "error" instead. The exit status is 1 only if no picture could be read.

With --output they go to a file, each picture once. The same command goes on after the finished pictures, with the
result of an uninterrupted one. FILE.settings.json beside the file has the model and the settings that it is of; other
ones are refused.

A model of clips (`data.frames` above 0) takes evenly spread frames of a video, and a picture as a clip that stands
still.

`--example` uses the checkpoint that comes with the package.
"""

import argparse
import contextlib
import functools
import itertools
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from simvlg_jax.config.arguments import add_cache_argument, add_checkpoint_argument, add_model_arguments, model_folder
from simvlg_jax.config.check import flat_keys
from simvlg_jax.config.load import override
from simvlg_jax.config.saved import read_config
from simvlg_jax.utils.errors import UserError, run_verb
from simvlg_jax.utils.lines import Lines, json_line

if TYPE_CHECKING:
    import numpy as np
    from ml_collections import ConfigDict

    from simvlg_jax.data.batch import Pictures
    from simvlg_jax.evaluation.caption_model import CaptionModel
    from simvlg_jax.training.restore import Run

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
THREADS = 4  # that read and decode pictures
# Keys of the config that determine a text, beside the checkpoint.
KEYS = (
    "seed",
    "dtype",
    "frozen_dtype",
    "frozen_compute",
    "vit.",
    "video.",
    "connector.",
    "llm.",
    "evaluate.",
    "data.frames",
    "data.prompt",
    "data.clean",
)


def main() -> int:
    arguments, overrides = parse()
    if not any(path.exists() for path in arguments.pictures):
        raise UserError(f"no such file or folder: {', '.join(map(str, arguments.pictures[:5]))}")
    suffixes = suffixes_of(override(read_config(model_folder(arguments)), overrides))
    pictures = list(itertools.chain.from_iterable(expand(path, suffixes) for path in arguments.pictures))
    if not pictures:
        raise UserError(f"no pictures in {', '.join(map(str, arguments.pictures))} ({', '.join(sorted(suffixes))})")
    arguments.batch_size = min(arguments.batch_size, len(pictures))  # a batch is filled up, which takes its time

    from simvlg_jax.api import find
    from simvlg_jax.parallel.compile_cache import keep_compiled

    keep_compiled(not arguments.no_cache)
    run = find(model_folder(arguments), None, arguments.checkpoint, overrides)
    task = functools.partial(write, run, overrides, arguments)
    if arguments.output is None:
        failed = task(pictures, 0, print_lines)
    else:
        names = list(dict.fromkeys(map(str, pictures)))
        settings = settings_of(run, arguments)
        with contextlib.closing(Lines(arguments.output, settings, "image", names, arguments.batch_size)) as lines:
            say(f"{lines.lines} pictures are in {arguments.output}, {len(lines.left)} are left")
            if lines.left:
                task([Path(name) for name in lines.left], lines.lines, lines.add)
            pictures, failed = range(lines.lines), lines.failed
    if failed:
        say(f"{failed} of {len(pictures)} pictures could not be read")
    return 1 if failed == len(pictures) else 0


def parse() -> tuple[argparse.Namespace, list[str]]:
    """Returns the arguments, and the overrides of the config."""
    parser = argparse.ArgumentParser(
        prog="python -m simvlg_jax.caption", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    add_checkpoint_argument(parser)
    add_cache_argument(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--prompt", help="words that the captions continue")
    which.add_argument("--question", help="is answered for each picture; the model must be trained on questions")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--output", type=Path, metavar="FILE.jsonl", help="default: standard output")
    parser.add_argument("pictures", nargs="+", type=Path, help="pictures or clips: files, or folders of them")
    arguments, rest = parser.parse_known_args()
    overrides = [given for given in rest if given.startswith("--config.")]
    if unknown := [given for given in rest if given not in overrides]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if arguments.batch_size < 1:
        raise UserError("--batch_size must be at least 1", 2)
    if arguments.question is not None and not arguments.question.strip():
        raise UserError("--question is empty", 2)
    return arguments, overrides


def suffixes_of(config: "ConfigDict") -> set[str]:
    """Returns the suffixes of what the model of a config takes from a folder."""
    from simvlg_jax.data.pictures import VIDEO_SUFFIXES

    return SUFFIXES.union(VIDEO_SUFFIXES if config.data.frames else ())


def expand(path: Path, suffixes: Collection[str]) -> list[Path]:
    """Returns the sorted files of a folder with these suffixes, including subfolders; any other path unchanged."""
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.suffix.lower() in suffixes and p.is_file())
    return [path]


def settings_of(run: "Run", arguments: argparse.Namespace) -> dict[str, object]:
    """Returns what determines the text of a picture."""
    config = {key: value for key, value in flat_keys(run.config).items() if key.startswith(KEYS)}
    del config["evaluate.batch_size"]
    model = {"model": str(model_folder(arguments).resolve()), "step": run.step}
    return {**model, "prompt": arguments.prompt, "question": arguments.question, **config}


def write(
    run: "Run",
    overrides: Sequence[str],
    arguments: argparse.Namespace,
    paths: Sequence[Path],
    done: int,
    emit: Callable[[list[dict]], None],
) -> int:
    """Lets the model write about pictures, batch by batch, while threads read the next ones.

    Args:
      done: number of pictures that are finished already.
      emit: takes the lines of a batch.

    Returns:
      How many pictures cannot be read.
    """
    from simvlg_jax.api import read_weights
    from simvlg_jax.utils.ahead import map_ahead
    from simvlg_jax.utils.bar import Progress
    from simvlg_jax.utils.progress import Announcer

    size = arguments.batch_size
    with Announcer(say).first("reading and compiling the model"):
        model = read_weights(run, overrides, size, arguments.prompt, arguments.question)
    shown = arguments.output is not None or not sys.stdout.isatty()  # else the bar would be between the lines
    read = functools.partial(read_or_explain, shape=run.task.batch.pictures)
    failed = 0
    with contextlib.ExitStack() as stack:
        images = stack.enter_context(contextlib.closing(map_ahead(read, paths, THREADS, 2 * size)))
        progress = Progress("captioning", done + len(paths), done, "pictures", "pictures", shown)
        stack.enter_context(contextlib.closing(progress))
        for start in range(0, len(paths), size):
            group = paths[start : start + size]
            records = records_of(model, group, list(itertools.islice(images, size)), arguments, done + start)
            emit(records)
            failed += sum("error" in record for record in records)
            progress.update(start + len(group), start + len(group))
    return failed


def read_or_explain(path: Path, shape: "Pictures") -> "np.ndarray | str":
    """Returns the picture or clip as the model sees it, see `read_visual`, or why it cannot be read."""
    from simvlg_jax.data import transforms
    from simvlg_jax.data.pictures import read_visual

    try:
        return read_visual(path, shape)
    except FileNotFoundError:
        return "no such file or folder"
    except transforms.UNREADABLE as error:
        return f"cannot read this picture: {error}"


def records_of(
    model: "CaptionModel", paths: Sequence[Path], images: list, arguments: argparse.Namespace, seed: int
) -> list[dict]:
    """Returns the line of each picture of a batch, given what `read_or_explain` returned."""
    readable = [image for image in images if not isinstance(image, str)]
    if arguments.question is None:
        what, common = "caption", {}
        written = model.several(readable, arguments.prompt, arguments.batch_size, seed)
    else:
        what, common = "answer", {"question": arguments.question}
        written = model.several_answers(readable, arguments.question, arguments.batch_size, seed)
    made = iter([common | {what: texts[0]} | ({f"{what}s": texts} if len(texts) > 1 else {}) for texts in written])
    return [
        {"image": str(path)} | ({"error": image} if isinstance(image, str) else next(made))
        for path, image in zip(paths, images, strict=True)
    ]


def print_lines(records: list[dict]) -> None:
    sys.stdout.write("".join(map(json_line, records)))
    sys.stdout.flush()


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_verb(main)
