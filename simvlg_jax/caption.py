"""Captions pictures. Prints one JSON line per picture on standard output, in the given order.

    python -m simvlg_jax.caption --example picture.png folder/
    python -m simvlg_jax.caption --workdir runs/openmoji --prompt "a" picture.png
    python -m simvlg_jax.caption --workdir runs/openmoji --config.evaluate.num_beams=5 picture.png

With `evaluate.num_captions` above 1, "captions" has all of them (samples, or the best beams).
`--example` uses the checkpoint that comes with the package. The line of an unreadable picture has an "error" instead of
a "caption". The exit status is 1 only if no picture could be read.
"""

import argparse
import json
import sys
from pathlib import Path

from simvlg_jax.config.arguments import add_checkpoint_argument, add_model_arguments, model_folder
from simvlg_jax.utils.errors import UserError, run_verb
from simvlg_jax.utils.progress import Announcer

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m simvlg_jax.caption", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    add_checkpoint_argument(parser)
    parser.add_argument("--prompt", help="words that the captions continue")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("pictures", nargs="+", type=Path, help="files, or folders of them")
    arguments, rest = parser.parse_known_args()
    overrides = [given for given in rest if given.startswith("--config.")]
    if unknown := [given for given in rest if given not in overrides]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if arguments.batch_size < 1:
        raise UserError("--batch_size must be at least 1", 2)
    pictures = [path for given in arguments.pictures for path in expand(given)]
    if not pictures:
        raise UserError(f"no pictures in {', '.join(map(str, arguments.pictures))} ({', '.join(sorted(SUFFIXES))})")
    if not any(path.exists() for path in pictures):
        raise UserError(f"no such file or folder: {', '.join(map(str, pictures[:5]))}")

    arguments.batch_size = min(arguments.batch_size, len(pictures))  # a batch is filled up, which takes its time
    from simvlg_jax.api import load
    from simvlg_jax.parallel.compile_cache import keep_compiled

    keep_compiled()
    announce = Announcer(lambda message: print(message, file=sys.stderr, flush=True))
    model = load(model_folder(arguments), checkpoint=arguments.checkpoint, overrides=overrides)
    failed = 0
    for start in range(0, len(pictures), arguments.batch_size):
        group = pictures[start : start + arguments.batch_size]
        with announce.first("compiling the model and captioning the first pictures"):
            results = caption_files(model, group, arguments)
        for path, result in zip(group, results, strict=True):
            failed += "error" in result
            print(json.dumps({"image": str(path), **result}, ensure_ascii=False), flush=True)
    if failed:
        print(f"{failed} of {len(pictures)} pictures could not be read", file=sys.stderr)
    return 1 if failed == len(pictures) else 0


def expand(path: Path) -> list[Path]:
    """Returns the sorted pictures of a folder, including subfolders; any other path unchanged."""
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    return [path]


def caption_files(model, paths: list[Path], arguments: argparse.Namespace) -> list[dict[str, str | list[str]]]:
    """Returns {"caption": ...} or {"error": ...} for each path, and "captions" where there are several."""
    from simvlg_jax.data import transforms

    results: list[dict[str, str | list[str]]] = [{} for _ in paths]
    readable, images = [], []
    for i, path in enumerate(paths):
        try:
            images.append(transforms.decode(transforms.read(path)))
            readable.append(i)
        except FileNotFoundError:
            results[i] = {"error": "no such file or folder"}
        except transforms.UNREADABLE as error:
            results[i] = {"error": f"cannot read this picture: {error}"}
    captions = model.several(images, arguments.prompt, arguments.batch_size) if images else []
    for i, several in zip(readable, captions, strict=True):
        results[i] = {"caption": several[0]} | ({"captions": several} if len(several) > 1 else {})
    return results


if __name__ == "__main__":
    run_verb(main)
