"""Look at the data as training sees it.

    python -m simvlg_jax.data.inspect --config configs/openmoji.py [--split train] [--out DIR]

Writes a contact sheet of one batch (augmented for train) with the captions as the model's tokens spell them, and
prints the number of records, caption lengths in tokens and how fast the pipeline delivers.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageDraw

from simvlg_jax.config import config_parser, load_config
from simvlg_jax.data.pipeline import Batch, Skipped, make_eval_batches, make_train_iterator
from simvlg_jax.data.sources import Source, load_source
from simvlg_jax.data.text import TextEncoder
from simvlg_jax.errors import run_verb
from simvlg_jax.training.tasks import build_task

TILE, LINE, COLUMNS = 160, 14, 8  # pixels, pixels, pictures a row
SECONDS = 3  # how long speed is measured
MAX_RECORDS = 10_000  # of which caption lengths are counted


def contact_sheet(batch: Batch, encoder: TextEncoder, columns: int = COLUMNS) -> Image.Image:
    """The pictures of a batch with their texts, decoded from the ids, below."""
    texts = [
        encoder.tokenizer.decode(ids[mask == 1].tolist(), skip_special_tokens=True)
        for ids, mask in zip(batch["ids"], batch["mask"], strict=True)
    ]
    rows = -(-len(texts) // columns)
    sheet = Image.new("RGB", (columns * TILE, rows * (TILE + 3 * LINE)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (pixels, text) in enumerate(zip(batch["image"], texts, strict=True)):
        x, y = i % columns * TILE, i // columns * (TILE + 3 * LINE)
        sheet.paste(Image.fromarray(pixels).resize((TILE - 4, TILE - 4), Image.Resampling.NEAREST), (x + 2, y + 2))
        characters = (TILE - 8) // 6  # of Pillow's built-in font
        lines = [text[start : start + characters] for start in range(0, len(text), characters)][:3]
        draw.multiline_text((x + 4, y + TILE), "\n".join(lines), fill="black", spacing=2, font_size=10)
    return sheet


def token_lengths(source: Source, encoder: TextEncoder) -> np.ndarray:
    """Tokens of each caption, start and end included, before padding and after cutting: int (N,)."""
    count = min(len(source), MAX_RECORDS)
    # Spread over the whole source if it is large.
    indices = np.linspace(0, len(source) - 1, count).astype(int)
    return np.array([len(encoder(source[int(i)]["caption"])[0]) for i in indices])


def batches_per_second(batches: Iterator[Batch]) -> float:
    """How many batches come out in about SECONDS seconds, per second."""
    next(batches)  # starting up is not counted
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < SECONDS and next(batches, None) is not None:
        count += 1
    return count / (time.perf_counter() - start)


def inspect(config: ConfigDict, split: str, out: Path) -> Path:
    """Prints the statistics of a split and writes OUT/SPLIT.png; returns its path."""
    task = build_task(config)
    encoder = task.text_encoder
    source = load_source(config.data, split, training=split == "train")
    lengths = token_lengths(source, encoder)
    size = config.train.batch_size if split == "train" else config.evaluate.batch_size
    skipped = Skipped()
    if split == "train":
        batches = make_train_iterator(
            config.data,
            source,
            encoder,
            image_size=task.image_size,
            batch_size=size,
            seed=config.seed,
            skipped=skipped,
        )
    else:
        batches = iter(make_eval_batches(source, encoder, image_size=task.image_size, batch_size=size))
    sheet = contact_sheet(next(batches), encoder)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{split}.png"
    sheet.save(path)

    print(f"{config.data.name}, split {split}: {len(source)} records")
    middle, high = np.percentile(lengths, [50, 99])
    print(
        f"caption tokens, start and end included: mean {lengths.mean():.1f}, median {middle:.0f}, "
        f"99 % {high:.0f}, longest {lengths.max()}; {np.mean(lengths == encoder.max_tokens):.1%} fill the limit "
        f"of {encoder.max_tokens}"
    )
    if split == "train":
        speed = batches_per_second(batches)
        print(f"pipeline: {speed:.1f} batches/s of {size}, {speed * size:.0f} pictures/s")
        print(f"unreadable pictures replaced so far: {skipped.count}")
        batches.close()
    print(f"contact sheet: {path}")
    return path


def main() -> None:
    parser = config_parser(__doc__, prog="python -m simvlg_jax.data.inspect")
    parser.add_argument("--split", default="train")
    parser.add_argument("--out", type=Path, default=Path("runs/inspect"), help="folder for the contact sheet")
    args, overrides = parser.parse_known_args()
    inspect(load_config(args.config, overrides), args.split, args.out)


if __name__ == "__main__":
    run_verb(main)
