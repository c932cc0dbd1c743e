"""Measures what large data ask of memory and of the disk: listing a source, opening what was prepared, and reading it.

    python -m simvlg_jax.benchmark.storage [--lines 2000000] [--records 10000000] [--pictures 20000] [--dir FOLDER]

Lists a synthetic JSONL file in a new process, as `prepare` does before it reads the first picture.

Writes synthetic data of both kinds that `prepare` writes, which are opened in new processes: an index over tars, and
ArrayRecord files of 4,096 records with their index. Then it writes tars of random bytes that have the size of pictures.
Before each order the files are dropped from the page cache. Reads are those that the disk counts, so nothing else
should use it meanwhile. FOLDER must be on a disk of Linux; what is written there is deleted at the end.
"""

import argparse
import io
import json
import multiprocessing
import os
import resource
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np
from ml_collections import ConfigDict

from simvlg_jax.config.defaults import get_config
from simvlg_jax.data.index import Row, Tar, write_index
from simvlg_jax.data.preparing import records as prepared_records
from simvlg_jax.data.readers import Options, choose
from simvlg_jax.data.readers.listing import SHARD
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


def many_rows(records: int) -> Iterator[Row]:
    """Every third record has two captions."""
    texts = ["a picture of something among many others"]
    return (
        Row(f"{i // PER_TAR:05d}/{i:09d}", texts * (1 + (i % 3 == 0)), None, i // PER_TAR, i % PER_TAR * BYTES, BYTES)
        for i in range(records)
    )


def write_large_index(folder: Path, records: int) -> None:
    """Writes an index of `records` pictures in tars that do not exist."""
    tars = [Tar(f"/absent/{number:05d}.tar", BYTES * PER_TAR) for number in range(-(-records // PER_TAR))]
    write_index(folder / "index-train.arrow", many_rows(records), tars=tars)


def write_large_copy(folder: Path, records: int) -> None:
    """Writes ArrayRecord files as `prepare` does for a list, with an index. Full files are links to one of them."""
    lengths = [min(SHARD, records - first) for first in range(0, records, SHARD)]
    template = prepared_records.template(str(folder), "large", "train")
    written: dict[int, Path] = {}
    for number, length in enumerate(lengths):
        path = Path(template.sharded_filepath(shard_index=number, num_shards=len(lengths)))
        if length in written:
            path.hardlink_to(written[length])
            continue
        writer = prepared_records.Writer(path, "image", questions=False)
        for row in many_rows(length):
            writer.write(row.id, b"", row.texts, None)
        writer.close()
        written[length] = path
    write_index(folder / "index-train.arrow", many_rows(records))
    kind = ("image", False)
    prepared_records.write_metadata(folder, str(folder), "large", "train", lengths, BYTES * records, kind)


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


def write_list(folder: Path, lines: int) -> None:
    """Writes a JSONL file about pictures that do not exist."""
    with (folder / "captions.jsonl").open("w") as file:
        for number, row in enumerate(many_rows(lines)):
            row = {"image": f"train/{row.id}.jpg", "caption": f"{row.texts[0]}, and it is number {number}"}
            file.write(json.dumps(row) + "\n")


def listing(folder: Path) -> str:
    """Lists the records of a source."""
    start = time.perf_counter()
    plan = choose([str(folder)], "auto")[1].plan([str(folder)], Options())
    return f"{len(plan.entries):,} pictures listed in {time.perf_counter() - start:.0f} s, {memory()}"


def opening(folder: Path) -> str:
    """Opens the split train for training."""
    start = time.perf_counter()
    source = load_source(data_config(folder), "train", training=True)
    return f"{len(source):,} captions opened in {time.perf_counter() - start:.2f} s, {memory()}"


def memory() -> str:
    """The most that this process has used."""
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB at most"  # kB on Linux


def fresh(measure: Callable[[Path], str], folder: Path) -> str:
    """Measures in a new process, whose memory is not that of what was done before."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(measure, folder).result()


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
    parser.add_argument("--lines", type=int, default=2_000_000, help="of the list; 0: none")
    parser.add_argument("--records", type=int, default=10_000_000, help="that are opened; 0: none")
    parser.add_argument("--pictures", type=int, default=20_000, help="in the tars that are read; 0: none")
    args = parser.parse_args()
    if min(args.lines, args.records, args.pictures) < 0:
        raise UserError("--lines, --records and --pictures must be at least 0", 2)
    for name, count, write, measure in (
        ("JSONL", args.lines, write_list, listing),
        ("tars", args.records, write_large_index, opening),
        ("ArrayRecord", args.records, write_large_copy, opening),
    ):
        if count:
            with tempfile.TemporaryDirectory(dir=args.dir) as temporary:
                write(Path(temporary), count)
                print(f"{name:12} {fresh(measure, Path(temporary))}", flush=True)
    if args.pictures:
        with tempfile.TemporaryDirectory(dir=args.dir) as temporary:
            write_tars(Path(temporary), args.pictures)
            for name in ORDERS:
                print(reading(Path(temporary), name), flush=True)


if __name__ == "__main__":
    run_verb(main)
