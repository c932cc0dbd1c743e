"""Groups emoji that are variants of one another, and chooses the pictures that are held out.

`val` and `test` hold unseen variants (skin tone, gender, hair, members of a couple) of emoji whose other variants are
in `train`. `novel` holds emoji without any variant in `train`.
"""

import hashlib
import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

SPLITS = ("train", "val", "test", "novel")
VAL_SHARE, TEST_SHARE = 0.1, 0.15  # of the variants of emoji with several variants
NOVEL_SHARE = 0.07  # of the emoji with few variants
# Thumbnails (0..255) with a smaller mean squared difference count as the same picture. The closest pictures that do
# differ (a person in bed, two skin tones) are at 1.3.
SAME_LOOK = 0.4
# Emoji with more variants stay in train, since a single one of them would fill `novel`.
NOVEL_MAX_VARIANTS = 6

_JOINERS = {"200D", "FE0F"}
_TONES = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}
_GENDERS = {"2640", "2642"}
_HAIR = {"1F9B0", "1F9B1", "1F9B2", "1F9B3"}
_FACING_RIGHT = {"27A1"}
_ADULT, _CHILD, _FAMILY = "1F9D1", "1F9D2", "1F46A"
# Emoji whose gender or hair is part of the code point -> the plain form.
_SAME = {
    **dict.fromkeys(("1F468", "1F469", "1F471"), _ADULT),
    **dict.fromkeys(("1F466", "1F467"), _CHILD),
    **dict.fromkeys(("1F474", "1F475"), "1F9D3"),  # old man, old woman
    "1F57A": "1F483",  # man dancing
    "1F478": "1FAC5",  # princess
    "1F934": "1FAC5",  # prince
    "1F930": "1FAC4",  # pregnant woman
    "1FAC3": "1FAC4",  # pregnant man
    "1F936": "1F385",  # Mrs Claus
    "1F46B": "1F46D",  # holding hands
    "1F46C": "1F46D",
}
# Sequences of several people -> the single code point of the same scene.
_SCENES = {
    (_ADULT, "2764", _ADULT): "1F491",
    (_ADULT, "2764", "1F48B", _ADULT): "1F48F",
    (_ADULT, "1F91D", _ADULT): "1F46D",
    (_ADULT, "1FAEF", _ADULT): "1F93C",
    (_ADULT, "1F430", _ADULT): "1F46F",
    ("1FAF1", "1FAF2"): "1F91D",
    (_ADULT, "1F384"): "1F385",
}


@dataclass(frozen=True)
class Picture:
    """One emoji: `id` and `base` are lower-case code points, `image` PNG bytes."""

    id: str
    base: str
    caption: str
    image: bytes


def base_of(codes: Sequence[str]) -> str:
    """The emoji without skin tone, gender and hair, as lower-case code points ("1f939").

    Args:
      codes: upper-case hex code points of the whole sequence.
    """
    parts = [code for code in codes if code not in _JOINERS]
    plain = [code for code in parts if code not in _TONES | _GENDERS | _HAIR | _FACING_RIGHT] or parts
    plain = tuple(_SAME.get(code, code) for code in plain)
    if len(plain) > 1 and set(plain) <= {_ADULT, _CHILD}:
        plain = (_FAMILY,)
    plain = (_SCENES[plain],) if plain in _SCENES else plain
    return "-".join(plain).lower()


def _thumbnail(png: bytes) -> np.ndarray:
    """PNG -> (3072,) float64, whole numbers in 0..255: 32 x 32 pixels, three colours."""
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.resize((32, 32), Image.Resampling.BOX), np.float64).ravel()


def fraction(key: str) -> float:
    """A hash of `key` in [0, 1)."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) / 2**64


def distinct(pictures: Sequence[Picture]) -> list[Picture]:
    """Drops pictures that look the same as another one, and keeps the order.

    OpenMoji draws "man farmer" and "farmer" alike, and some couples without the skin tones in their name. Of pictures
    that look the same, the one with the shortest caption stays.
    """
    order = sorted(range(len(pictures)), key=lambda i: (len(pictures[i].caption), pictures[i].id))
    # Whole numbers in float64 are exact, so the result is the same on every machine.
    thumbnails = np.stack([_thumbnail(pictures[i].image) for i in order])  # (N, 3072) float64
    squares = np.sum(thumbnails**2, axis=1)
    distances = squares[:, None] + squares - 2 * (thumbnails @ thumbnails.T)  # (N, N)
    alike = distances <= SAME_LOOK * thumbnails.shape[1]
    kept = np.zeros(len(order), bool)
    for i in range(len(order)):
        kept[i] = not np.any(alike[i, :i] & kept[:i])
    return [pictures[i] for i in sorted(np.asarray(order)[kept])]


def assign(pictures: Sequence[Picture]) -> dict[str, list[Picture]]:
    """Divides `distinct` pictures into splits, in which they keep their order."""
    families = defaultdict(list)
    for picture in pictures:
        families[picture.base].append(picture)
    split_of = {}
    for base, family in families.items():
        if len(family) <= NOVEL_MAX_VARIANTS and fraction(f"novel {base}") < NOVEL_SHARE:
            split_of |= {picture.id: "novel" for picture in family}
            continue
        places = {picture.id: fraction(f"{base} {picture.id}") for picture in family}
        # Each family keeps at least one member in train.
        kept = max(places, key=places.get)
        for name, place in places.items():
            if name == kept or place >= VAL_SHARE + TEST_SHARE:
                split_of[name] = "train"
            else:
                split_of[name] = "val" if place < VAL_SHARE else "test"
    return {split: [picture for picture in pictures if split_of[picture.id] == split] for split in SPLITS}
