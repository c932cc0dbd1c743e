"""Prepares a split from start to finish; a run that was interrupted goes on."""

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from etils import epath

from simvlg_jax.data.extras import NONE
from simvlg_jax.data.preparing import beam, finish, local, records
from simvlg_jax.data.preparing.shard import Job
from simvlg_jax.data.preparing.staging import Staging, locked
from simvlg_jax.data.readers import LABELLED_BY_ROWS, Example, Options, Plan, choose, listing, paths, resolve
from simvlg_jax.utils.bar import Progress
from simvlg_jax.utils.errors import UserError

VERSION = 1  # of what the same source is made into
_IMAGES = "; if paths in a list are relative to another folder than the list's, name that with --images"
# Format -> what to do if most of what was skipped is missing.
HINTS = {"lavis": _IMAGES, "table": _IMAGES, "webdataset": "; give --source a pattern of the tars that exist"}


@dataclass(frozen=True)
class Settings:
    """The arguments of the command.

    Attributes:
      images: folder that paths in lists are relative to; "" is the list's.
      max_side: pixels, 0 for no limit.
      max_skipped: share of what was read.
      unlabelled: see `Options`.
    """

    sources: Sequence[str]
    output: str
    format: str = "auto"
    split: str = "train"
    images: str = ""
    max_side: int = 0
    workers: int = 0
    index_only: bool = False
    engine: str = "local"
    beam_options: str = ""
    max_skipped: float = 0.5
    unlabelled: bool = False


@dataclass
class Summary:
    """What was prepared.

    Attributes:
      seconds: that this run took, None if there was nothing left to do.
      fresh: records and skips of this run.
    """

    written: int
    skipped: Counter
    seconds: float | None = None
    fresh: int = 0

    @property
    def read(self) -> int:
        return self.written + self.skipped.total()

    def __str__(self) -> str:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in self.skipped.most_common())
        text = f"read {self.read:,}, written {self.written:,}, skipped {self.skipped.total():,}"
        text += f" ({reasons})" if reasons else ""
        return text + (f"; {self.fresh / self.seconds:.0f} records/s" if self.seconds and self.fresh else "")


def prepare(settings: Settings) -> Summary:
    """Prepares a split, or what is left of it.

    Raises UserError if an argument is wrong, if nothing can be read, if too much was skipped, or if the output was
    prepared from another source.
    """
    start = time.monotonic()
    if settings.engine == "beam":
        beam.check_installed()
    output = settings.output if paths.is_remote(settings.output) else os.path.abspath(settings.output)
    sources = resolve(settings.sources)
    images = settings.images
    if images and not paths.is_remote(images):
        images = os.path.abspath(images)
    if inside := next((source for source in sources if f"{output}/".startswith(f"{source.rstrip('/')}/")), None):
        raise UserError(f"--output {output} lies in the source {inside}: choose a folder outside of it", status=2)
    kind, reader = choose(sources, settings.format)
    if settings.unlabelled and kind not in LABELLED_BY_ROWS:
        raise UserError(f"--unlabelled is for lists and tables, and {sources[0]} has the format {kind}", status=2)
    plan = reader.plan(sources, Options(settings.split, images, settings.index_only, settings.unlabelled))
    if settings.index_only and (plan.entries or any(shard.tar is None for shard in plan.shards)):
        raise UserError(f"--index_only is for WebDataset tars, and {sources[0]} has the format {kind}", status=2)
    with locked(output):
        return _prepare(settings, output, plan, kind, start)


def _prepare(settings: Settings, output: str, plan: Plan, kind: str, start: float) -> Summary:
    split = settings.split
    fingerprint = _fingerprint(settings, plan, kind)
    staging = Staging(output, split)
    about = _finished(output, settings, fingerprint)
    if about is not None:
        staging.remove()
        return Summary(about["written"], Counter(about["skipped"]))
    if not (plan.shards or plan.entries):
        raise UserError(f"{', '.join(settings.sources)}: nothing to read for the split {split}")
    name = _begin(settings, output, plan, staging, fingerprint)
    shards = dict(enumerate(plan.shards))
    job = Job(output, split, name, len(shards), plan.media, plan.questions, settings.max_side, settings.index_only)
    before = staging.done()
    left = {number: shard for number, shard in shards.items() if number not in before}
    if before:
        print(f"going on: {len(before)} of {len(shards)} shards are done", flush=True)
    if settings.engine == "beam":
        beam.run(job, left, settings.beam_options)
    else:
        weights = sum(shard.weight for shard in shards.values())
        progress = Progress("preparing", weights, weights - sum(shard.weight for shard in left.values()), plan.unit)
        try:
            local.run(job, left, settings.workers or local.cores(), progress)
        finally:
            progress.close()
    reports = staging.done()
    if absent := [number for number in shards if number not in reports]:
        raise UserError(f"{len(absent)} of {len(shards)} shards have no report, such as {absent[0]}: run again")
    skipped: Counter = Counter()
    for report in reports.values():
        skipped.update(report.skipped)
    summary = Summary(sum(report.written for report in reports.values()), skipped)
    summary.fresh = summary.read - sum(one.written + sum(one.skipped.values()) for one in before.values())
    _check_share(settings, output, summary, staging, name, kind)
    about = {
        "fingerprint": fingerprint,
        "sources": list(settings.sources),
        "format": kind,
        "max_side": settings.max_side,
        "index_only": settings.index_only,
        "written": summary.written,
        "skipped": dict(sorted(summary.skipped.items())),
    }
    finish.finish(job, staging, reports, about)
    summary.seconds = time.monotonic() - start
    return summary


def _fingerprint(settings: Settings, plan: Plan, kind: str) -> str:
    """Hash of the plan and of the options that the result depends on."""
    options = [VERSION, kind, settings.split, settings.max_side, settings.index_only, plan.media, plan.questions]
    options += ["unlabelled"] * settings.unlabelled
    digest = hashlib.sha256(json.dumps([options, plan.roots, [repr(shard) for shard in plan.shards]]).encode())
    for entry in plan.entries:
        # Without extras that older versions lacked, so that their data stay valid.
        if isinstance(entry, Example) and entry.extras.reverse_caption is None:
            bare = entry.extras == NONE
            entry = entry[:-1] if bare else (*entry[:-1], entry.extras[:-1])
        digest.update(json.dumps(entry).encode())
    return digest.hexdigest()


def _finished(output: str, settings: Settings, fingerprint: str) -> dict | None:
    """What prepared-SPLIT.json says if the split is whole. Raises UserError if it is from another source."""
    split = settings.split
    about_path = finish.about_path(output, split)
    about = json.loads(about_path.read_text()) if about_path.exists() else None
    info = records.read_info(output)
    copied = info is not None and split in info.splits
    indexed = about is not None and about["index_only"] and finish.index_path(output, split).exists()
    if not copied and not indexed:
        return None
    if about is None or about["fingerprint"] != fingerprint:
        raise UserError(
            f'{output} already holds the split "{split}", prepared from '
            f"{', '.join(about['sources']) if about else 'something else'}. The source or the options are not the same "
            "now: choose another --output or --split, or delete that folder"
        )
    return about


def _begin(settings: Settings, output: str, plan: Plan, staging: Staging, fingerprint: str) -> str:
    """Makes the staging folder, or checks that it is of the same plan; returns the name of the data set."""
    info = records.read_info(output)
    if info is not None and not settings.index_only and not records.same_features(info, plan.media, plan.questions):
        raise UserError(
            f"{output} holds splits with other features ({', '.join(info.features)}) than "
            f"{', '.join(records.features(plan.media, plan.questions))}: choose another --output"
        )
    state = staging.read_state()
    if state and state["fingerprint"] != fingerprint:
        raise UserError(
            f"{output} holds an unfinished preparation of {settings.split} from another source, or the source or the "
            f"options have changed since: delete {os.fspath(staging.folder)} to start again, or choose another --output"
        )
    name = info.name if info is not None else state.get("name") or records.name_of(output)
    try:
        staging.folder.mkdir(parents=True, exist_ok=True)
        if not state:
            # Shards of an unfinished preparation whose staging folder was deleted.
            for old in epath.Path(output).glob(f"{name}-{settings.split}.{records.SUFFIX}-*"):
                old.unlink()
            staging.examples.unlink(missing_ok=True)  # of a run that was killed before it wrote its state
        if plan.entries:
            listing.spool(plan, staging.examples)
        if not state:
            staging.write_state(fingerprint, name)
    except PermissionError as error:
        raise UserError(f"cannot write to {output} ({error.strerror}): choose another --output") from error
    return name


def _check_share(settings: Settings, output: str, summary: Summary, staging: Staging, name: str, kind: str) -> None:
    """Raises UserError if nothing was written, which leaves nothing, or if too much was skipped."""
    missing = summary.skipped["missing file"]
    hint = ""
    if missing and missing * 2 > summary.skipped.total():
        hint = HINTS.get(kind, "")
    bare = summary.skipped["no caption"] + summary.skipped["no answer"]
    if bare * 2 > summary.skipped.total() and kind in LABELLED_BY_ROWS:
        hint = "; to keep records without captions or answers, as test splits have them, add --unlabelled"
    if not summary.written:
        for path in epath.Path(output).glob(f"{name}-{settings.split}.{records.SUFFIX}-*"):
            path.unlink()
        example = _first_skip(staging)
        staging.remove()
        raise UserError(f"nothing in {', '.join(settings.sources)} can be used: {summary}{example}{hint}")
    share = summary.skipped.total() / summary.read
    if share > settings.max_skipped:
        raise UserError(
            f"{100 * share:.1f} % were skipped, more than --max_skipped {settings.max_skipped}: {summary}"
            f"{_first_skip(staging)}{hint}\n"
            "to accept it, run again with a larger --max_skipped: what is done is kept"
        )


def _first_skip(staging: Staging) -> str:
    """One skipped record as an example for a message."""
    for number in staging.done():
        with staging.skipped(number).open("r") as lines:
            for line in lines:
                skip = json.loads(line)
                return f", for example {skip['source']} ({skip['reason']})"
    return ""
