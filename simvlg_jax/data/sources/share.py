"""A share of the records of another source, evenly spread over it: `config.data.share`."""

from simvlg_jax.data.sources.source import Record, RecordInfo, Source


class Share:
    """The records of a source at even distances, one at least."""

    def __init__(self, source: Source, share: float):
        self._source, self._count = source, max(1, round(len(source) * share))

    def __len__(self) -> int:
        return self._count

    def _place(self, index: int) -> int:
        if not 0 <= index < self._count:
            raise IndexError(index)
        return int(index) * len(self._source) // self._count

    def __getitem__(self, index: int) -> Record:
        return self._source[self._place(index)]

    def info(self, index: int) -> RecordInfo:
        return self._source.info(self._place(index))

    @property
    def prefetch(self):
        """`prefetch` of the source, for the range that holds these records; None if it has none."""
        prefetch = getattr(self._source, "prefetch", None)
        return prefetch and (lambda start, stop: prefetch(self._place(start), self._place(stop - 1) + 1))
