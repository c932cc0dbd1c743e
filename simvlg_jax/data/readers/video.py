"""Folders of videos with captions beside them: `x.mp4` with `x.txt` or `x.json`."""

from collections.abc import Iterable

from etils import epath

from simvlg_jax.data.pictures import VIDEO_SUFFIXES
from simvlg_jax.data.readers import files
from simvlg_jax.data.readers.reader import Options, Plan


def recognises(source: epath.Path) -> bool:
    return files.holds(source, VIDEO_SUFFIXES)


def plan(sources: Iterable[str], options: Options) -> Plan:
    del options  # a folder of files has no lists and no splits
    return files.plan_folders(sources, "video", VIDEO_SUFFIXES)
