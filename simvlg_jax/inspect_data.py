"""Shows the data as training gets them.

    python -m simvlg_jax.data.inspect --config configs/openmoji.py [--split train] [--out DIR]

Writes a contact sheet of one batch (augmented if the split is train) with the captions decoded from their tokens.
Prints the number of records and the caption lengths in tokens, and for the split train the speed of the pipeline.
"""

from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from simvlg_jax.config.arguments import config_parser
from simvlg_jax.config.load import load_config
from simvlg_jax.data.pipeline import Skipped, make_eval_batches, make_train_iterator
from simvlg_jax.data.sources import load_source
from simvlg_jax.data.statistics import batches_per_second, contact_sheet, token_lengths
from simvlg_jax.tasks import build_task
from simvlg_jax.utils.errors import run_verb


def inspect(config: ConfigDict, split: str, out: Path) -> Path:
    """Prints the statistics of a split and writes its contact sheet; returns the path OUT/SPLIT.png."""
    spec = build_task(config).batch
    source = load_source(config.data, split, training=split == "train")
    lengths = token_lengths(source, spec.texts[spec.main_text].encoder)
    limit = spec.texts[spec.main_text].max_tokens
    skipped = Skipped()
    if split == "train":
        size = config.train.batch_size
        batches = make_train_iterator(config.data, source, spec, batch_size=size, seed=config.seed, skipped=skipped)
    else:
        batches = iter(make_eval_batches(source, spec, batch_size=config.evaluate.batch_size))
    sheet = contact_sheet(next(batches), spec)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{split}.png"
    sheet.save(path)

    print(f"{config.data.name}, split {split}: {len(source)} records")
    middle, high = np.percentile(lengths, [50, 99])
    print(
        f"caption tokens, start and end included: mean {lengths.mean():.1f}, median {middle:.0f}, "
        f"99 % {high:.0f}, longest {lengths.max()}; {np.mean(lengths == limit):.1%} fill the limit of {limit}"
    )
    if split == "train":
        speed = batches_per_second(batches)
        print(f"pipeline: {speed:.1f} batches/s of {size}, {speed * size:.0f} pictures/s")
        print(f"unreadable pictures replaced: {skipped.count}")
        batches.close()
    print(f"contact sheet: {path}")
    return path


def main() -> None:
    parser = config_parser(__doc__, prog="python -m simvlg_jax.data.inspect")
    parser.add_argument("--split", default="train")
    parser.add_argument("--out", type=Path, default=Path("runs/inspect"), help="output folder of the contact sheet")
    args, overrides = parser.parse_known_args()
    inspect(load_config(args.config, overrides), args.split, args.out)


if __name__ == "__main__":
    run_verb(main)
