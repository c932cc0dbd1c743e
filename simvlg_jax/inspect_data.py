"""Shows the data as training gets them.

    python -m simvlg_jax.data.inspect --config configs/openmoji.py [--split train] [--out DIR]

Writes the page DIR/SPLIT.html: numbers of records, sizes and formats of pictures, caption lengths, and the samples of
one batch (augmented if the split is train) with their tokens, coloured by whether they are targets, input or padding.
Prints the main numbers, and for the split train the speed of the pipeline.
"""

from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from simvlg_jax.config.arguments import config_parser
from simvlg_jax.config.load import load_config
from simvlg_jax.data.mixture import load_training
from simvlg_jax.data.page import samples, write_page
from simvlg_jax.data.pipeline import make_eval_batches, make_train_iterator
from simvlg_jax.data.sources import load_source
from simvlg_jax.data.statistics import batches_per_second, describe
from simvlg_jax.tasks import build_task
from simvlg_jax.utils.errors import run_verb

SAMPLES = 48  # on the page, at most


def inspect(config: ConfigDict, split: str, out: Path) -> Path:
    """Prints the statistics of a split and writes its page; returns the path OUT/SPLIT.html."""
    spec = build_task(config).batch
    training = split == "train"
    source = load_training(config.data) if training else load_source(config.data, split)
    text = spec.texts[spec.main_text]
    found = describe(source, text.encoder, videos=bool(config.data.frames))
    if training:
        size = config.train.batch_size
        batches = make_train_iterator(config.data, source, spec, batch_size=size, seed=config.seed)
    else:
        batches = iter(make_eval_batches(source, spec, batch_size=config.evaluate.batch_size))
    shown = samples(next(batches), spec)[:SAMPLES]
    speed = None
    if training:
        rate = batches_per_second(batches)
        speed = f"{rate:.1f} batches/s of {size}, {rate * size:.0f} examples/s"
        batches.close()
    path = out / f"{split}.html"
    write_page(path, f"{config.data.name}, split {split}", found, text.max_tokens, shown, speed)

    print(f"{config.data.name}, split {split}: {found.records} records")
    if lengths := found.tokens:
        middle, high = np.percentile(lengths, [50, 99])
        print(
            f"caption tokens, start and end included: mean {np.mean(lengths):.1f}, median {middle:.0f}, "
            f"99 % {high:.0f}, longest {max(lengths)}; "
            f"{np.mean(np.array(lengths) == text.max_tokens):.1%} fill the limit of {text.max_tokens}"
        )
    for error, count in found.dead.most_common():
        print(f"cannot be used: {count} of {found.sampled} records: {error}")
    if speed:
        print(f"pipeline: {speed}")
    print(f"page: {path}")
    return path


def main() -> None:
    parser = config_parser(__doc__, prog="python -m simvlg_jax.data.inspect")
    parser.add_argument("--split", default="train")
    parser.add_argument("--out", type=Path, default=Path("runs/inspect"), help="output folder of the page")
    args, overrides = parser.parse_known_args()
    inspect(load_config(args.config, overrides), args.split, args.out)


if __name__ == "__main__":
    run_verb(main)
