"""Synthetic photographs: smooth noise of many scales with edges and grain, whose JPEGs are as large as photographs'."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

QUALITY = 90
_SCALES = ((4, 60), (8, 40), (16, 30), (32, 20), (64, 14), (128, 10), (320, 6))  # cells across, amplitude


def photo(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Draws one picture in mode RGB."""
    grey = sum(
        amplitude * _smooth(rng.normal(size=(max(2, cells * height // width), cells)), width, height)
        for cells, amplitude in _SCALES
    )
    y, x = np.mgrid[:height, :width]
    slope, offset = rng.normal(), rng.uniform(0.2, 0.8)
    grey += 40 * np.sign(y / height - offset - slope * (x / width - 0.5))  # an edge, such as a horizon
    grey += rng.normal(size=grey.shape) * 3  # the sensor's noise
    tints = [40 * _smooth(rng.normal(size=(6, 8)), width, height) for _ in range(3)]
    return Image.fromarray(np.stack([128 + 0.8 * grey + tint for tint in tints], -1).clip(0, 255).astype(np.uint8))


def _smooth(cells: np.ndarray, width: int, height: int) -> np.ndarray:
    return np.asarray(Image.fromarray(cells.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC))


def write_photos(folder: Path, count: int, size: tuple[int, int]) -> float:
    """Writes a folder that `data.name=folder` reads: `count` JPEGs of `size` (4:2:0) and captions.jsonl.

    Pictures that the folder already holds are kept.

    Returns:
      Mean size of a file in bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{size[0]}x{size[1]}_{number:05}.jpg" for number in range(count)]
    for number, name in enumerate(tqdm(names, desc="making pictures", unit="picture", leave=False, disable=None)):
        if not (folder / name).exists():
            out = io.BytesIO()
            photo(np.random.default_rng(number), *size).save(out, "JPEG", quality=QUALITY, subsampling="4:2:0")
            (folder / name).write_bytes(out.getvalue())
    lines = [
        {"image": name, "caption": f"synthetic photograph number {n}", "split": "train"} for n, name in enumerate(names)
    ]
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return float(np.mean([(folder / name).stat().st_size for name in names]))
