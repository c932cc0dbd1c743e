"""Measures what prepared data ask of the disk: opening a large index, and reading in each order of `data.shuffle`.

    python -m simvlg_jax.benchmark.storage [--records 10000000] [--pictures 20000] [--dir FOLDER]

Writes a synthetic index, and tars of random bytes that have the size of pictures. Before each order the files are
dropped from the page cache. Reads are those that the disk counts, so nothing else should use it meanwhile. FOLDER must
be on a disk of Linux; what is written there is deleted at the end.
"""

import argparse
import io
import os
import resource
import tarfile
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np
from ml_collections import ConfigDict

from simvlg_jax.config.defaults import get_config
from simvlg_jax.data.index import Row, Tar, write_index
from simvlg_jax.data.shuffling import shuffled
from simvlg_jax.data.sources import load_source
from simvlg_jax.utils.errors import UserError, run_verb

BYTES = 60_000  # of a picture
PER_TAR = 5000  # pictures
READ = 0.8  # share of the pictures that each order reads
ORDERS = {
    "global": {"shuffle": "global"},
    "blocks, 1024 x 4": {"shuffle": "blocks", "block_size": 1024, "window_blocks": 4},
    "blocks, 1024 x 16": {"shuffle": "blocks", "block_size": 1024, "window_blocks": 16},
}


class Reads(NamedTuple):
    """What a disk has done: number of reads, and bytes."""

    count: int
    bytes: int


def data_config(folder: Path, **fields) -> ConfigDict:
    config = get_config().data
    config.update({"name": "prepared", "path": str(folder), **fields})
    return config


def write_large_index(folder: Path, records: int) -> None:
    """Writes an index of `records` pictures in tars that do not exist; every third picture has two captions."""
    texts = ["a picture of something among many others"]
    rows = (
        Row(f"{i // 10_000:05d}/{i:09d}", texts * (1 + (i % 3 == 0)), None, i // 10_000, i % 10_000 * BYTES, BYTES)
        for i in range(records)
    )
    tars = [Tar(f"/absent/{number:05d}.tar", BYTES * 10_000) for number in range(-(-records // 10_000))]
    write_index(folder / "index-train.arrow", rows, tars=tars)


def write_tars(folder: Path, pictures: int) -> None:
    """Writes tars of random bytes, and their index."""
    rows, tars = [], []
    for first in range(0, pictures, PER_TAR):
        path = folder / f"{len(tars):05d}.tar"
        with tarfile.open(path, "w") as tar:
            for number in range(first, min(first + PER_TAR, pictures)):
                member = tarfile.TarInfo(f"{number:09d}.jpg")
                member.size = BYTES
                tar.addfile(member, io.BytesIO(os.urandom(BYTES)))
        with tarfile.open(path) as tar:
            rows += [Row(m.name, ["a caption"], None, len(tars), m.offset_data, m.size) for m in tar]
        tars.append(Tar(str(path), path.stat().st_size))
    write_index(folder / "index-train.arrow", rows, tars=tars)


def forget(folder: Path) -> None:
    """Drops the folder's files from the page cache."""
    os.sync()
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def reads_of(folder: Path) -> Reads:
    """What the disk of the folder has read so far. Raises UserError if it is not a disk that Linux counts for."""
    device = folder.stat().st_dev
    path = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat")
    if not path.exists():
        raise UserError(f"{folder} is not on a disk of Linux: choose another --dir")
    fields = path.read_text().split()
    return Reads(int(fields[0]), 512 * int(fields[2]))


def opening(folder: Path) -> str:
    """Opens the split train for training, and says how long it took and how much memory this process has used."""
    start = time.perf_counter()
    source = load_source(data_config(folder), "train", training=True)
    seconds = time.perf_counter() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kB on Linux
    return f"{len(source):,} captions opened in {seconds:.2f} s, {memory:.2f} GB at most"


def reading(folder: Path, name: str) -> str:
    """Reads READ of the pictures in one order."""
    config = data_config(folder, **ORDERS[name])
    source = load_source(config, "train", training=True)
    pictures = shuffled(grain.MapDataset.source(source), config, 7, source.prefetch)
    forget(folder)
    before, start, count = reads_of(folder), time.perf_counter(), int(READ * len(source))
    for number in range(count):
        pictures[number]
    seconds = time.perf_counter() - start
    reads, size = np.subtract(reads_of(folder), before)
    return (
        f"{name:20} {reads / count:6.2f} reads a picture, {size / max(reads, 1) / 1000:6.0f} kB each, "
        f"{count / seconds:6.0f} pictures/s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m simvlg_jax.benchmark.storage",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dir", type=Path, default=None, help="folder on the disk that is measured")
    parser.add_argument("--records", type=int, default=10_000_000, help="of the index that is opened; 0: none")
    parser.add_argument("--pictures", type=int, default=20_000, help="in the tars that are read; 0: none")
    args = parser.parse_args()
    if min(args.records, args.pictures) < 0:
        raise UserError("--records and --pictures must be at least 0", 2)
    for count, write in ((args.records, write_large_index), (args.pictures, write_tars)):
        if not count:
            continue
        with tempfile.TemporaryDirectory(dir=args.dir) as temporary:
            folder = Path(temporary)
            write(folder, count)
            if write is write_large_index:
                print(opening(folder), flush=True)
            else:
                for name in ORDERS:
                    print(reading(folder, name), flush=True)


if __name__ == "__main__":
    run_verb(main)
