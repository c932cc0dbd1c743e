"""Short, stable reasons why `prepare` skips data; those of reading and decoding are the ones of training."""

from simvlg_jax.data import skipped


class Fault(Exception):
    """Something is wrong with one record; the message is the reason to skip it."""


def reason(error: BaseException) -> str:
    """Returns the reason to skip a record whose reading or decoding raised `error`."""
    if isinstance(error, Fault):
        return str(error)
    if isinstance(error, FileNotFoundError):  # buckets raise it without a number
        return "missing file"
    return "too large" if isinstance(error, MemoryError) else skipped.reason(error)
