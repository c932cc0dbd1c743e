"""What the data look like to the model: a contact sheet of a batch, caption lengths, the speed of the pipeline."""

import time
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageDraw

from simvlg_jax.data.pipeline import Batch
from simvlg_jax.data.sources import Source
from simvlg_jax.data.text import TextEncoder

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
