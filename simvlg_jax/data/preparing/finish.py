"""The last step of preparing a split: one index, one list of what was skipped, and the metadata of TFDS."""

import json
import shutil

from etils import epath

from simvlg_jax.data.index import merge_indexes
from simvlg_jax.data.preparing import records
from simvlg_jax.data.preparing.shard import Job
from simvlg_jax.data.preparing.staging import Report, Staging, publish, write_text
from simvlg_jax.utils.files import atomic_write


def index_path(output: str, split: str) -> epath.Path:
    return epath.Path(output) / f"index-{split}.arrow"


def skipped_path(output: str, split: str) -> epath.Path:
    return epath.Path(output) / f"skipped-{split}.jsonl"


def about_path(output: str, split: str) -> epath.Path:
    return epath.Path(output) / f"prepared-{split}.json"


def finish(job: Job, staging: Staging, reports: dict[int, Report], about: dict) -> None:
    """Writes what makes a split whole. The file that others look for is the last: dataset_info.json, or the index.

    Args:
      about: what is written to prepared-SPLIT.json.
    """
    numbers = range(job.count)
    with atomic_write(skipped_path(job.output, job.split)) as partial, partial.open("wb") as file:
        for number in numbers:
            with staging.skipped(number).open("rb") as part:
                shutil.copyfileobj(part, file)
    write_text(about_path(job.output, job.split), json.dumps(about, indent=1, ensure_ascii=False) + "\n")
    merge_indexes(index_path(job.output, job.split), [staging.index(number) for number in numbers])
    if not job.index_only:
        lengths = [reports[number].written for number in numbers]
        size = sum(report.bytes for report in reports.values())
        with staging.attempt() as folder:
            records.write_metadata(folder, job.output, job.name, job.split, lengths, size, (job.media, job.questions))
            for name in (records.FEATURES, records.INFO):
                publish(folder / name, epath.Path(job.output) / name)
    staging.remove()
