"""Data in every format that `prepare` reads, whose pictures show by their colour which caption is theirs."""

import csv
import io
import json
import zlib
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow_datasets as tfds
import webdataset
from PIL import Image

from simvlg_jax.data import transforms
from simvlg_jax.data.index import Index
from simvlg_jax.data.preparing.run import Settings, Summary, prepare

TOLERANCE = 12  # of a colour after JPEG


def caption(number: int, variant: int = 0) -> str:
    return f"picture {number}" + f", caption {variant}" * (variant > 0)


def colour(text: str) -> tuple[int, int, int]:
    """The colour of the picture that a caption of ours belongs to."""
    hashed = zlib.crc32(text.split(",")[0].encode())
    return tuple((hashed >> shift & 7) * 36 for shift in (0, 8, 16))


def picture(number: int, kind: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (16, 12), **save) -> bytes:
    image = Image.new("RGB", size, colour(caption(number)))
    if mode == "I;16":
        image = Image.fromarray(np.full(size[::-1], number * 256, np.uint16))
    elif mode != "RGB":
        image = image.convert(mode)
    out = io.BytesIO()
    image.save(out, kind, **save)
    return out.getvalue()


def assert_own_captions(image: bytes, texts: list[str]) -> None:
    """Every caption of ours, also one that was damaged behind its number, is of this picture."""
    pixels = np.asarray(transforms.decode(image)).reshape(-1, 3).mean(0)
    for text in texts:
        assert np.abs(pixels - colour(text)).max() <= TOLERANCE, (text, pixels, colour(text))


def run(output: Path, *sources: Path | str, **options) -> Summary:
    options = {"workers": 1, "max_skipped": 1.0} | options
    return prepare(Settings([str(source) for source in sources], str(output), **options))


def records(output: Path, split: str = "train") -> list[dict]:
    """Records as TFDS reads them, with encoded pictures; checked against the index."""
    builder = tfds.builder_from_directory(output)
    raw = {"image": tfds.decode.SkipDecoding()} if "image" in builder.info.features else None
    found = [dict(record) for record in builder.as_data_source(split, decoders=raw)]
    index = Index(output / f"index-{split}.arrow")
    assert len(index) == len(found)
    for row, record in zip(index, found, strict=True):
        texts = record["captions"] if row.question is None else record["answers"]
        assert row.id == record["id"].decode() and row.texts == [text.decode() for text in texts]
    assert len({row.id for row in index}) == len(index)
    return found


def rows(output: Path, split: str = "train") -> list[tuple[str, list[str]]]:
    index = Index(output / f"index-{split}.arrow")
    return [(row.id, row.texts) for row in index]


def skipped(output: Path, split: str = "train") -> list[tuple[str, str]]:
    """Name of each skipped source without its folder, and the reason."""
    lines = (output / f"skipped-{split}.jsonl").read_text().splitlines()
    return [(Path(skip["source"]).name, skip["reason"]) for skip in map(json.loads, lines)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write_files(folder: Path, count: int, kind: str = "JPEG") -> Path:
    for number in range(count):
        path = folder / f"{number // 10:05d}" / f"{number:09d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number, kind))
        path.with_suffix(".txt").write_text(f"\n{caption(number)}\nmore")
    return folder


def write_pictures(folder: Path, count: int) -> list[str]:
    """Pictures without captions; returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"{number}.png").write_bytes(picture(number))
    return [f"{number}.png" for number in range(count)]


def write_tars(folder: Path, count: int, tars: int = 1, text: str = "txt", kind: str = "jpg") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    formats = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
    for tar in range(tars):
        with webdataset.TarWriter(str(folder / f"{tar:05d}.tar")) as writer:
            for number in range(tar * count, (tar + 1) * count):
                own = {"caption": caption(number)} if text == "json" else caption(number)
                writer.write({"__key__": f"{number:05d}", kind: picture(number, formats[kind]), text: own})
    return folder


def write_jsonl(folder: Path, count: int, name: str = "captions.jsonl") -> Path:
    names = write_pictures(folder, count)
    lines = [json.dumps({"image": image, "caption": caption(number)}) for number, image in enumerate(names)]
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder / name


def write_csv(folder: Path, count: int, name: str = "list.csv") -> Path:
    names = write_pictures(folder, count)
    with (folder / name).open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "caption"])
        table.writerows([image, caption(number)] for number, image in enumerate(names))
    return folder / name


def write_parquet(folder: Path, count: int, name: str = "train-00000-of-00001.parquet") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": picture(number), "path": f"{number}.png"} for number in range(count)]
    captions = [[caption(number), caption(number, 1)] for number in range(count)]
    pq.write_table(pa.table({"image": images, "text": captions}), folder / name, row_group_size=4)
    return folder / name


def write_json(folder: Path, content: object, count: int = 0, name: str = "list.json") -> Path:
    write_pictures(folder, count)
    (folder / name).write_text(json.dumps(content))
    return folder / name


def write_lavis(folder: Path, count: int) -> Path:
    content = [
        {"image": f"{number}.png", "caption": caption(number, variant), "image_id": f"coco_{number}"}
        for number in range(count)
        for variant in range(2)
    ]
    return write_json(folder, content, count)


def write_videos(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        with av.open(str(folder / f"{number}.mp4"), "w") as container:
            stream = container.add_stream("mpeg4", rate=4)
            stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
            for _ in range(4):
                pixels = np.full((32, 32, 3), colour(caption(number)), np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
            container.mux(stream.encode())
        (folder / f"{number}.txt").write_text(caption(number))
    return folder
