"""The loader that ours is compared with: torch's DataLoader with Pillow's transforms and uint8 pictures."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps

from simvlg_jax.data import transforms
from simvlg_jax.data.sources import Source
from simvlg_jax.data.text import TextEncoder


@dataclass
class Pairs(torch.utils.data.Dataset):
    """(uint8 (S, S, 3), int64 (L,)) for each record, by RandomResizedCrop (bicubic), flip and padding."""

    source: Source
    encoder: TextEncoder
    side: int
    scale: tuple[float, float]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        record = self.source[index]
        rng = np.random.default_rng(torch.randint(2**31, ()).item())
        picture = transforms.decode(record["image"])
        view = pillow_view(picture, self.side, self.scale, rng)
        ids, _ = self.encoder(record["caption"])
        text = torch.full((self.encoder.max_tokens,), self.encoder.pad_id)
        text[: len(ids)] = torch.tensor(ids)
        return torch.from_numpy(view), text


def pillow_view(picture: Image.Image, side: int, scale: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """`transforms.augment` with Pillow alone: uint8 (S, S, 3)."""
    box = transforms.crop_box(*picture.size, scale, rng)
    view = picture.crop(box).resize((side, side), Image.Resampling.BICUBIC)
    return np.array(ImageOps.mirror(view) if rng.random() < 0.5 else view)


def make_loader(pairs: Pairs, batch_size: int, workers: int) -> torch.utils.data.DataLoader:
    """Shuffled batches. The workers stay for the next epoch, which may start before the last one is over."""
    return torch.utils.data.DataLoader(
        pairs,
        batch_size,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
        multiprocessing_context="spawn",
        persistent_workers=True,
    )
