"""JSON files of LAVIS, of COCO, and of Karpathy's splits.

    [{"image": "val2014/1.jpg", "caption": "a cat", "image_id": "coco_1"}, ...]     captions; also lists of captions
    [{"image": "1.jpg", "question": "what is it?", "answer": ["cat", "cat"]}, ...]  VQA, OK-VQA, GQA
    [{"video": "video7.mp4", "caption": "a cat runs", "image_id": 7}, ...]          MSR-VTT, MSVD, WebVid
    {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"image_id": 1, "caption": "a cat"}]}  COCO
    {"images": [{"filepath": "val2014", "filename": "1.jpg", "split": "val", "sentences": [{"raw": "a cat"}]}]}

Paths are relative to `Options.images`, or to the folder of the JSON file.
"""

import json
import os
import posixpath
from collections.abc import Iterable, Iterator
from typing import Any

from etils import epath

from simvlg_jax.data.captions import well_formed
from simvlg_jax.data.readers import fields, listing, paths
from simvlg_jax.data.readers.reader import Options, Plan, Skip
from simvlg_jax.data.skips import Fault

Row = dict[str, Any]


def recognises(source: epath.Path) -> bool:
    if source.is_dir():
        names = [name for name in paths.first_files(os.fspath(source)) if "/" not in name]
        return any(name.endswith(".json") for name in names)
    return source.name.lower().endswith(".json")


def plan(sources: Iterable[str], options: Options) -> Plan:
    roots: list[str] = []

    def rows() -> Iterator[listing.Listed | Skip]:
        for file in _files(sources):
            roots.append(options.images or posixpath.dirname(file))
            if roots[-1] in roots[:-1]:
                roots.pop()
            yield from _rows(file, roots.index(options.images or posixpath.dirname(file)), options)

    return listing.plan_of(rows(), roots)


def _files(sources: Iterable[str]) -> Iterator[str]:
    for source in sources:
        if epath.Path(source).is_dir():
            names = sorted(file.path for file in paths.walk(source) if "/" not in file.path)
            yield from (posixpath.join(source, name) for name in names if name.lower().endswith(".json"))
        else:
            yield source


def _rows(file: str, root: int, options: Options) -> Iterator[listing.Listed | Skip]:
    try:
        content = json.loads(epath.Path(file).read_bytes().decode("utf-8-sig"))
    except OSError as error:
        yield Skip(file, f"cannot be read: {error.strerror}" if error.strerror else "cannot be read")
        return
    except (ValueError, RecursionError):
        yield Skip(file, "not JSON")
        return
    rows = _joined(content) if isinstance(content, dict) else content
    if not isinstance(rows, list):
        yield Skip(file, "wrong type")
        return
    for number, row in enumerate(rows):
        rows[number] = None  # so that what a row becomes takes its place in memory
        yield from listed(row, f"{file}, entry {number}", root, options.split, options.unlabelled)


def listed(
    row: Any, where: str, root: int, split: str | None = None, unlabelled: bool = False
) -> Iterator[listing.Listed | Skip]:
    """A row of a list, or the reason to skip it; nothing if it belongs to another split than `split`."""
    try:
        if not isinstance(row, dict):
            raise Fault("wrong type")
        row = {name.strip().lower(): value for name, value in row.items() if isinstance(name, str)}
        if split is not None and fields.split_of(row) not in (None, fields.canonical(split)):
            return
        found = fields.parse(row, unlabelled)
        if isinstance(found.source, bytes):
            raise Fault("wrong type")
        yield listing.Listed(f"{where}: {well_formed(found.source[:200])}", root, found)
    except Fault as fault:
        yield Skip(where, str(fault))


def _joined(content: Row) -> list[Any] | None:
    """Rows of a COCO or Karpathy file, or of a file that holds its rows under "annotations" or "data"."""
    images, annotations = content.get("images"), content.get("annotations", content.get("data"))
    if not isinstance(images, list):
        return annotations
    if not isinstance(annotations, list):
        return [_karpathy(image) for image in images]
    captions: dict[Any, list[Any]] = {}
    for annotation in annotations:
        if isinstance(annotation, dict) and isinstance(annotation.get("image_id"), int | str):
            captions.setdefault(annotation["image_id"], []).append(annotation.get("caption"))
    rows: list[Any] = []
    for image in images:
        known = isinstance(image, dict) and isinstance(image.get("id"), int | str)
        # Popped, so that what remains belongs to no picture.
        rows.append({**image, "image_id": image["id"], "caption": captions.pop(image["id"], None)} if known else image)
    return rows + [{"image_id": name} for name in captions]


def _karpathy(image: Any) -> Any:
    if not isinstance(image, dict) or not isinstance(image.get("filename"), str):
        return image
    folder = image.get("filepath") if isinstance(image.get("filepath"), str) else ""
    own_id = image.get("cocoid", image.get("imgid"))
    path = posixpath.join(folder, image["filename"])
    return {"image": path, "caption": image.get("sentences"), "image_id": own_id, "split": image.get("split")}
