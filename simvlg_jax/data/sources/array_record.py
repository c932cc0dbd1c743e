"""Reads records of TFDS data sources, and tells damaged files from bugs."""

from collections.abc import Sequence
from typing import Any


def read_record(records: Sequence[dict[str, Any]], index: int) -> dict[str, Any]:
    """Returns `records[index]`. Raises OSError if its ArrayRecord file is absent, damaged or truncated."""
    try:
        record = records[int(index)]
    except (RuntimeError, ValueError, IndexError) as error:  # of ArrayRecord, by the kind of damage
        raise OSError(f"the shard of record {index} cannot be read: {error}") from error
    if any(value is None for value in record.values()):  # what ArrayRecord gives past the end of a truncated file
        raise OSError(f"the shard of record {index} is truncated")
    return record
