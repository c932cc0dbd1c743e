"""Prepares one shard: a pure function of its description, whose result is files."""

import errno
import json
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from simvlg_jax.data.captions import well_formed
from simvlg_jax.data.index import Row, write_index
from simvlg_jax.data.preparing import media, records
from simvlg_jax.data.preparing.staging import Report, Staging, publish, write_text
from simvlg_jax.data.readers import Item, Shard, Skip
from simvlg_jax.data.skips import Fault
from simvlg_jax.utils.errors import UserError, first_line

EXPECTED = (OSError, UserError)


class Job(NamedTuple):
    """What all shards of a split share.

    Attributes:
      name: of the data set.
      count: number of shards.
      media: "image" or "video".
    """

    output: str
    split: str
    name: str
    count: int
    media: str
    questions: bool
    max_side: int
    index_only: bool


def prepare_shard(
    job: Job, number: int, shard: Shard, advance: Callable[[int, int], None] = lambda weight, count: None
) -> Report:
    """Writes the records of a shard, its part of the index, what it skipped, and at last the report that it is done.

    Args:
      advance: called with the weight that is done, and the number of records that were read.

    Raises UserError or OSError if a file cannot be written.
    """
    staging = Staging(job.output, job.split)
    try:
        with staging.attempt() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, about damage that it copes with
            return _prepare(job, number, shard, advance, staging, folder)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise UserError(f"shard {number} failed ({first_line(error)}): run again, it goes on from here") from error


def _prepare(
    job: Job, number: int, shard: Shard, advance: Callable[[int, int], None], staging: Staging, folder: Path
) -> Report:
    rows, skips = [], []
    writer = None if job.index_only else records.Writer(folder / "records", job.media, job.questions)
    for weight, found in shard.read():
        advance(weight, len(rows) + len(skips))
        if isinstance(found, Skip):
            skips.append(found)
            continue
        skips += [Skip(found.where, fault) for fault in found.faults]
        try:
            data = media.checked(job.media, found.media, job.max_side)
        except Fault as fault:
            skips.append(Skip(found.where, str(fault)))
            continue
        rows.append(_row(found, job.index_only))
        if writer is not None:
            writer.write(found.id, data, found.texts, found.question)
    advance(shard.weight, len(rows) + len(skips))
    if writer is not None:
        writer.close()
        target = records.template(job.output, job.name, job.split)
        publish(folder / "records", target.sharded_filepath(shard_index=number, num_shards=job.count))
    write_index(folder / "index", rows, media=job.media, tars=[shard.tar] if job.index_only else [])
    publish(folder / "index", staging.index(number))
    lines = [json.dumps({"source": well_formed(where), "reason": why}, ensure_ascii=False) for where, why in skips]
    (folder / "skipped").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    publish(folder / "skipped", staging.skipped(number))
    report = Report(len(rows), writer.bytes if writer else 0, dict(Counter(skip.reason for skip in skips)))
    write_text(staging.report(number), json.dumps(report))
    return report


def _row(item: Item, in_tar: bool) -> Row:
    place = (0, item.offset, len(item.media)) if in_tar else ()
    return Row(item.id, item.texts, item.question, *place)._replace(**item.extras._asdict())
