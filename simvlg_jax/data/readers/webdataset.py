"""Tars in the format of WebDataset: members of one key are one sample, such as `a.jpg` and `a.txt`.

The key is the path up to the first dot of the file's name, and all members of a sample are neighbours. The caption is
the first line of `txt` that is not empty, or "caption" (or "captions", a list) of `json`. Tars hold pictures, or videos
if the first sample has one. "group" and "reverse_caption" of `json` are kept, also beside `txt`.
"""

import contextlib
import os
import posixpath
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple

from etils import epath

from simvlg_jax.data import transforms
from simvlg_jax.data.captions import well_formed
from simvlg_jax.data.extras import NONE, Extras
from simvlg_jax.data.index import Tar
from simvlg_jax.data.pictures import VIDEO_SUFFIXES
from simvlg_jax.data.readers import fields, listing, paths, texts
from simvlg_jax.data.readers.reader import Item, Options, Plan, Skip
from simvlg_jax.data.skips import Fault
from simvlg_jax.utils.errors import UserError

SUFFIXES = {"image": ("jpg", "jpeg", "png", "webp"), "video": tuple(suffix[1:] for suffix in VIDEO_SUFFIXES)}
KINDS = {suffix: media for media, suffixes in SUFFIXES.items() for suffix in suffixes}
LARGEST = {"image": transforms.MAX_BYTES, "video": listing.MAX_VIDEO_BYTES}
TEXTS = ("txt", "json")
MEMBER = re.compile(r"((?:.*/|)[^./][^./]*)[.]([^/]*)", re.DOTALL)
THREADS = 32  # that ask a bucket for the sizes of tars
COMPRESSED = (".tar.gz", ".tgz")
DAMAGED = (tarfile.TarError, OSError, EOFError, zlib.error, ValueError, OverflowError, RecursionError, MemoryError)


class Member(NamedTuple):
    """A file of a sample; `data` is None if it cannot be used."""

    offset: int
    data: bytes | None
    fault: str = ""


def recognises(source: epath.Path) -> bool:
    if source.is_dir():
        return any(name.lower().endswith((".tar", *COMPRESSED)) for name in paths.first_files(os.fspath(source)))
    return source.name.lower().endswith((".tar", *COMPRESSED))


def plan(sources: Iterable[str], options: Options) -> Plan:
    """Raises UserError if a compressed tar is to be indexed in place."""
    tars = [tar for source in sources for tar in _tars(source)]
    compressed = next((tar for tar in tars if tar.lower().endswith(COMPRESSED)), None)
    if compressed and options.index_only:
        raise UserError(
            f"{compressed} is compressed, so its samples cannot be read in place: leave out --index_only", status=2
        )
    stems = [re.sub(r"(\.tar|\.tar\.gz|\.tgz)$", "", posixpath.basename(tar), flags=re.I) for tar in tars]
    with ThreadPoolExecutor(THREADS) as threads:
        stamps = list(threads.map(_stamp, tars))
    media = next(filter(None, map(_media, (tar for tar, stamp in zip(tars, stamps, strict=True) if stamp))), "image")
    shards = [
        TarShard(Tar(tar, int(stamp.split()[0]) if stamp else 0), stamp, well_formed(stem), media)
        for tar, stamp, stem in zip(tars, stamps, listing.distinct(stems), strict=True)
    ]
    return Plan(media, shards=shards, unit="bytes")


def _media(tar: str) -> str | None:
    """Returns what the first sample of a tar is of, a video if it has both; None if that cannot be said."""
    first, found = None, set()
    # A damaged tar is skipped with its reason when it is read.
    with contextlib.suppress(*DAMAGED), epath.Path(tar).open("rb") as file:
        for _, key, suffix, _ in _members(file, tar.lower().endswith(COMPRESSED), None):
            if found and key != first:
                break
            if suffix in KINDS:
                first = key
                found.add(KINDS[suffix])
    return "video" if "video" in found else next(iter(found), None)


def _stamp(tar: str) -> str:
    try:
        return paths.stamp(tar)
    except OSError:
        return ""  # absent, which reading it reports


def _tars(source: str) -> list[str]:
    if not epath.Path(source).is_dir():
        return [source]
    names = sorted(file.path for file in paths.walk(source))
    return [posixpath.join(source, name) for name in names if name.lower().endswith((".tar", *COMPRESSED))]


@dataclass(frozen=True)
class TarShard:
    """One tar. `media` is what its samples are of, "image" or "video".

    It is not in the repr, of which fingerprints are made: those of older data must not change. `Plan.media` is in them.
    """

    tar: Tar
    stamp: str
    prefix: str
    media: str = field(default="image", repr=False)

    @property
    def weight(self) -> int:
        return self.tar.size

    def read(self) -> Iterator[tuple[int, Item | Skip]]:
        """Reads the tar once, in order. At a break, the samples before it count, and the break itself is skipped."""
        seen: set[str] = set()
        try:
            with epath.Path(self.tar.path).open("rb") as file:
                compressed = self.tar.path.lower().endswith(COMPRESSED)
                for position, key, members in _samples(file, compressed, self.media):
                    yield position, self._item(key, members, key in seen)
                    seen.add(key)
        except FileNotFoundError:
            yield 0, Skip(self.tar.path, "missing file")
        except DAMAGED as error:
            yield self.weight, Skip(self.tar.path, "truncated tar" if _is_truncated(error) else "damaged tar")

    def _item(self, key: str, members: dict[str, Member], again: bool) -> Item | Skip:
        name = well_formed(key.encode("utf-8", "surrogateescape").decode("utf-8", "replace"))
        where = f"{self.tar.path}, {name}"
        picture = next((members[suffix] for suffix in SUFFIXES[self.media] if suffix in members), None)
        side = next((suffix for suffix in TEXTS if suffix in members), None)
        try:
            if again:
                raise Fault("duplicate key")
            if picture is None:
                raise Fault("no picture")
            if picture.data is None:
                raise Fault(picture.fault)
            if side is None:
                raise Fault("no caption")
            if members[side].data is None:
                raise Fault(members[side].fault)
            found = listing.described_by(members[side].data, side == "json")
            extras = found.extras if side == "json" else _extras(members.get("json"))
        except Fault as fault:
            return Skip(where, str(fault))
        name = f"{self.prefix}/{name}"
        return Item(where, name, picture.data, found.texts, None, picture.offset, found.faults, extras)


def _extras(member: Member | None) -> Extras:
    """What a JSON file says beside a text with the caption. Raises Fault if a text in it cannot be used."""
    if member is None or member.data is None:
        return NONE
    try:
        content = texts.parse_json(member.data)
    except Fault:
        return NONE
    return fields.beside(content) if isinstance(content, dict) else NONE


def _samples(file: BinaryIO, compressed: bool, media: str) -> Iterator[tuple[int, str, dict[str, Member]]]:
    """Yields the position, key and members of each sample. Raises one of DAMAGED where the tar breaks off."""
    key, members, position = None, {}, 0
    broken = None
    try:
        for place, name, suffix, member in _members(file, compressed, media):
            if name != key or suffix in members:
                if members:
                    yield position, key, members
                key, members, position = name, {}, place
            if member is not None:
                members[suffix] = member
    except DAMAGED as error:
        broken = error
    # A sample at the break counts if it has a picture and a caption.
    if members and (broken is None or (members.keys() & set(SUFFIXES[media]) and members.keys() & set(TEXTS))):
        yield position, key, members
    if broken is not None:
        raise broken


def _members(file: BinaryIO, compressed: bool, media: str | None) -> Iterator[tuple[int, str, str, Member | None]]:
    """Yields the position, key and suffix of each file, and its content if samples of `media` need it."""
    needed = {*SUFFIXES[media], *TEXTS} if media else ()
    position = 0
    with tarfile.open(fileobj=file, mode="r:gz" if compressed else "r:") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # they would fill the memory
            if tar.offset <= position:
                raise tarfile.ReadError("a negative size")  # else it would be read again and again
            match = MEMBER.fullmatch(member.name)
            if match is not None and not member.isdir():
                suffix = match[2].lower()
                yield position, match[1], suffix, _read(tar, member, suffix) if suffix in needed else None
            position = tar.offset
        _check_end(tar)


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo, suffix: str) -> Member:
    if member.type not in tarfile.REGULAR_TYPES or member.issparse():
        return Member(0, None, "not a file")
    if member.size == 0:
        return Member(0, None, "empty file" if suffix in KINDS else "caption empty")
    if member.size > (LARGEST[KINDS[suffix]] if suffix in KINDS else texts.MAX_BYTES):
        return Member(0, None, "too large" if suffix in KINDS else "caption too long")
    data = tar.extractfile(member).read()
    if len(data) < member.size:
        raise tarfile.ReadError("unexpected end of data")
    return Member(member.offset_data, data)


def _check_end(tar: tarfile.TarFile) -> None:
    """Raises ReadError unless the tar ends with a block of zeros or with its last member.

    Python takes a damaged header in the middle of a tar for its end.
    """
    tar.fileobj.seek(tar.offset)
    block = tar.fileobj.read(tarfile.BLOCKSIZE)
    if block.strip(b"\0"):
        raise tarfile.ReadError("truncated header" if len(block) < tarfile.BLOCKSIZE else "damaged header")


def _is_truncated(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, EOFError) or any(part in text for part in ("unexpected end", "truncated", "empty"))
