"""Looks at data as the model sees them: a contact sheet of a batch, caption lengths, the speed of the pipeline."""

import time
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageDraw

from simvlg_jax.data.batch import Batch, BatchSpec
from simvlg_jax.data.sources import Source
from simvlg_jax.data.text import TextEncoder

TILE, LINE, COLUMNS = 160, 14, 8  # pixels, pixels, pictures per row
SECONDS = 3  # of measuring the speed
MAX_RECORDS = 10_000  # whose caption lengths are counted


def contact_sheet(batch: Batch, spec: BatchSpec, columns: int = COLUMNS) -> Image.Image:
    """Draws the pictures of a batch, each above its first text, which is decoded from the ids."""
    name = spec.main_text
    tokenizer = spec.texts[name].encoder.tokenizer
    texts = [
        tokenizer.decode(ids[mask == 1].tolist(), skip_special_tokens=True)
        for ids, mask in zip(batch[f"{name}_ids"], batch[f"{name}_mask"], strict=True)
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
    """Number of tokens of each caption after cutting, start and end included: int (N,).

    Of a large source, MAX_RECORDS captions at equal distances are counted.
    """
    count = min(len(source), MAX_RECORDS)
    indices = np.linspace(0, len(source) - 1, count).astype(int)
    return np.array([len(encoder(source[int(i)]["caption"])[0]) for i in indices])


def batches_per_second(batches: Iterator[Batch]) -> float:
    """Measures the iterator for about SECONDS seconds."""
    next(batches)  # leaves the start-up out
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < SECONDS and next(batches, None) is not None:
        count += 1
    return count / (time.perf_counter() - start)
