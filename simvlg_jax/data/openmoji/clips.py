"""Makes short videos of moving OpenMoji pictures with captions, and prepares them for training (docs/video.md).

    python -m simvlg_jax.data.openmoji.clips --output data/openmoji_clips

The folder DIR/source gets what a user's data would be: MP4 files, and a list for each split. DIR gets what
`python -m simvlg_jax.data.prepare --source DIR/source/train.json --output DIR` makes of them. A command that was
interrupted goes on where it stopped, and the same arguments give the same data.
"""

import argparse
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageChops, ImageOps

from simvlg_jax.data import clips
from simvlg_jax.data.openmoji.motions import FRAMES, Pose, Scene
from simvlg_jax.data.openmoji.prepare import prepare_openmoji
from simvlg_jax.data.openmoji.scenes import SIDE, THINGS, divide
from simvlg_jax.utils.bar import Progress
from simvlg_jax.utils.errors import UserError, run_verb
from simvlg_jax.utils.files import atomic_write, write_json

COUNTS = {"train": 4000, "val": 200, "test": 500, "unseen": 500}
RATE = 10  # frames per second
# Lower crf is better. The macroblock tree of x264 reads memory that it has not written where pictures are as small as
# ours, so that two runs would give two files.
ENCODER = {"crf": "18", "x264-params": "mbtree=0"}
KEYFRAMES = 12  # frames between two keyframes
CORNER = SIDE // 4  # pixels around a picture that turns, so that its corners are not cut

Pictures = Mapping[str, Image.Image]


def read_pictures(data_dir: str) -> Pictures:
    """The picture of each of `THINGS`, RGB on white, from the training split of the example data."""
    # Late: the sources import TFDS.
    from simvlg_jax.data.sources import load_source

    source = load_source(ConfigDict({"name": "openmoji", "dir": data_dir}), "train")
    places = {source.info(index).references[0]: index for index in range(len(source))}
    return {name: Image.open(io.BytesIO(source[places[name]]["image"])).convert("RGB") for name in THINGS}


def draw(scene: Scene, pictures: Pictures) -> np.ndarray:
    """The frames of a scene: uint8 (FRAMES, SIDE, SIDE, 3)."""
    return np.stack([_frame(scene.at(number), pictures) for number in range(FRAMES)])


def _frame(poses: Sequence[tuple[str, Pose]], pictures: Pictures) -> np.ndarray:
    frame = Image.new("RGB", (SIDE, SIDE), "white")
    for thing, (x, y, size, angle) in poses:
        picture = pictures[thing]
        if angle:
            picture = ImageOps.expand(picture, CORNER, "white")
            picture = picture.rotate(-angle, Image.Resampling.BICUBIC, fillcolor="white")
            size = round(size * picture.width / SIDE)
        layer = Image.new("RGB", frame.size, "white")
        layer.paste(picture.resize((size, size), Image.Resampling.BICUBIC), (x - size // 2, y - size // 2))
        frame = ImageChops.darker(frame, layer)
    return np.asarray(frame)


def encode(frames: np.ndarray) -> bytes:
    """An H.264 video in MP4, the same bytes in every run.

    Args:
      frames: uint8 (F, H, W, 3).
    """
    av = clips.load_av()
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=RATE, options=ENCODER)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.gop_size = "yuv420p", KEYFRAMES
        stream.thread_count = 1  # else the bytes depend on the number of cores
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        file.mux(stream.encode())
    return out.getvalue()


def row_of(scene: Scene) -> dict[str, str]:
    """The row of a list. Without "reverse_caption" the caption of the reversed clip is the same."""
    caption, reverse = scene.caption(), scene.reverse().caption()
    row = {"video": f"videos/{scene.id}.mp4", "video_id": scene.id, "caption": caption, "group": scene.group}
    return row if reverse == caption else row | {"reverse_caption": reverse}


def write_source(data_dir: str, folder: Path, counts: Mapping[str, int], seed: int) -> Iterator[str]:
    """Writes videos and a list of each split below `folder`, and yields the name of the split.

    A video that is there is left as it is: its name has a hash of what it shows. Raises UserError if the folder holds
    lists of other clips.
    """
    clips.load_av()
    scenes = divide(counts, seed)
    lists = {split: [row_of(scene) for scene in own] for split, own in scenes.items()}
    for split, rows in lists.items():
        path = folder / f"{split}.json"
        if path.exists() and json.loads(path.read_text()) != rows:
            raise UserError(f"{path} lists clips of another --clips or --seed: choose another --output, or delete it")
    prepare_openmoji(data_dir)
    pictures = read_pictures(data_dir)
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    for split, rows in lists.items():
        left = [(scene, folder / row["video"]) for scene, row in zip(scenes[split], rows, strict=True)]
        left = [(scene, path) for scene, path in left if not path.exists()]
        progress = Progress(f"rendering {split}", len(rows), len(rows) - len(left), "clips", "clips")
        try:
            for done, (scene, path) in enumerate(left, 1):
                with atomic_write(path) as partial:
                    partial.write_bytes(encode(draw(scene, pictures)))
                progress.update(done, done)
        finally:
            progress.close()
        write_json(folder / f"{split}.json", rows)
        yield split


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m simvlg_jax.data.openmoji.clips",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", default="data/openmoji_clips", metavar="DIR", help="folder of the data")
    parser.add_argument("--data_dir", default="data", help="folder of the pictures, rendered if absent (default: data)")
    clips_help = f"number of training clips (default: {COUNTS['train']}); the other splits stay the same"
    parser.add_argument("--clips", type=int, default=COUNTS["train"], metavar="N", help=clips_help)
    parser.add_argument("--seed", type=int, default=0, help="of the scenes (default: 0)")
    given = parser.parse_args()
    if given.clips < 1 or given.seed < 0:
        raise UserError("--clips takes a number above 0, and --seed one that is not negative", 2)
    from simvlg_jax.data.preparing.run import Settings, prepare

    folder = Path(given.output) / "source"
    for split in write_source(given.data_dir, folder, COUNTS | {"train": given.clips}, given.seed):
        summary = prepare(Settings([str(folder / f"{split}.json")], given.output, "lavis", split))
        print(f"{split}: {summary}")


if __name__ == "__main__":
    run_verb(main)
