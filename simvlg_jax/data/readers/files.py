"""Folders of pictures with captions beside them: `x.jpg` with `x.txt` or `x.json`, as img2dataset writes them.

The caption is the first line of the text file that is not empty, or "caption" of the JSON file if there is no text
file.
"""

import os
import posixpath
from collections.abc import Iterable

from etils import epath

from simvlg_jax.data.captions import well_formed
from simvlg_jax.data.readers import listing, paths
from simvlg_jax.data.readers.reader import Example, Options, Plan

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"),
    *(".avif", ".jp2", ".j2k", ".ppm", ".pgm", ".pnm", ".tga", ".mpo"),
)
BESIDE = (".txt", ".json")
LISTS = ("captions.jsonl", "metadata.jsonl", "metadata.csv", "metadata.parquet")  # of a folder that is a table


def recognises(source: epath.Path) -> bool:
    return holds(source, SUFFIXES)


def holds(source: epath.Path, suffixes: tuple[str, ...]) -> bool:
    """Whether a folder holds a file with one of the suffixes and a caption beside it, and no list of captions."""
    if not source.is_dir():
        return False
    names = paths.first_files(os.fspath(source))
    stems = {posixpath.splitext(name)[0] for name in names if name.lower().endswith(suffixes)}
    listed = any(posixpath.basename(name) in LISTS for name in names)
    return not listed and any(posixpath.splitext(name)[0] in stems for name in names if name.lower().endswith(BESIDE))


def plan(sources: Iterable[str], options: Options) -> Plan:
    del options  # a folder of files has no lists and no splits
    return plan_folders(sources, "image", SUFFIXES)


def plan_folders(sources: Iterable[str], media: str, suffixes: tuple[str, ...]) -> Plan:
    """Lists the pictures or videos below folders, sorted by path, with the files beside them."""
    roots = list(sources)
    entries, names = [], []
    for root, folder in enumerate(roots):
        files = sorted(paths.walk(folder))
        stamps = dict(files)
        named = {posixpath.splitext(path)[0] for path in stamps if path.lower().endswith(suffixes)}
        for path in stamps:
            stem, suffix = posixpath.splitext(path)
            where = os.path.join(folder, path)
            if suffix.lower() in suffixes:
                side = next((stem + ending for ending in BESIDE if stem + ending in stamps), "")
                stamp = f"{stamps[path]} {stamps.get(side, '')}"
                entries.append(Example(where, root, path, "", None, None, side, stamp))
                names.append(well_formed(path))
            elif suffix.lower() in BESIDE and stem not in named:
                entries.append(Example(where, root, "", "", None, None, path, stamps[path]))
                names.append(well_formed(path))
    ids = listing.distinct(names)
    entries = [entry._replace(id=name) for entry, name in zip(entries, ids, strict=True)]
    return Plan(media, entries=entries, roots=roots)
