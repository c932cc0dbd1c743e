"""Weight maps between our trees and PyTorch state dicts: tables with a row for each parameter, for both directions.

A row is (our path, PyTorch name, layout). The parts of our path are joined with "/"; `{i}` stands for the layer number.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
from flax import traverse_util

from simvlg_jax.utils.errors import UserError

Tensors = dict[str, np.ndarray]


class Row(NamedTuple):
    """One parameter.

    Attributes:
      ours: our path, such as "a/b/kernel".
      torch: PyTorch's name, such as "a.b.weight".
      layout: how PyTorch's array becomes ours, a key of `LAYOUTS`.
      heads: number of heads; None for as many as the model's queries have.
    """

    ours: str
    torch: str
    layout: str = "same"
    heads: int | None = None


def _heads_out(w: np.ndarray, heads: int) -> np.ndarray:  # (H*K, D) -> (D, H, K)
    return w.reshape(heads, -1, w.shape[-1]).transpose(2, 0, 1)


def _patches_out(w: np.ndarray) -> np.ndarray:  # (P*P*3, D) -> (D, 3, P, P)
    side = round((w.shape[0] // 3) ** 0.5)
    return w.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)


LAYOUTS = {  # name: (function from PyTorch's array and the number of heads, function to PyTorch's array)
    "same": (lambda w, heads: w, lambda w: w),
    "linear": (lambda w, heads: w.T, lambda w: w.T),
    "heads_out": (_heads_out, lambda w: w.transpose(1, 2, 0).reshape(-1, w.shape[0])),  # q, k, v weight
    "heads_bias": (lambda b, heads: b.reshape(heads, -1), lambda b: b.reshape(-1)),  # q, k, v bias
    "patches": (lambda w, heads: w.transpose(0, 2, 3, 1).reshape(w.shape[0], -1).T, _patches_out),  # of a convolution
    "positions": (lambda w, heads: w.reshape(1, *w.shape), lambda w: w[0]),  # (N, D) and (1, N, D)
    "heads_in": (lambda w, heads: w.T.reshape(heads, -1, w.shape[0]), lambda w: w.reshape(-1, w.shape[-1]).T),
}


def linear(ours: str, torch: str) -> list[Row]:
    return [Row(f"{ours}/kernel", f"{torch}.weight", "linear"), Row(f"{ours}/bias", f"{torch}.bias")]


def layer_norm(ours: str, torch: str) -> list[Row]:
    return [Row(f"{ours}/scale", f"{torch}.weight"), Row(f"{ours}/bias", f"{torch}.bias")]


def query_key_value(ours: str, torch: str) -> list[Row]:
    return [Row(f"{ours}/kernel", f"{torch}.weight", "heads_out"), Row(f"{ours}/bias", f"{torch}.bias", "heads_bias")]


def merge_heads(ours: str, torch: str) -> list[Row]:
    return [Row(f"{ours}/kernel", f"{torch}.weight", "heads_in"), Row(f"{ours}/bias", f"{torch}.bias")]


def numbered(rows: Iterable[Row], count: int) -> list[Row]:
    """Returns the rows for each layer, with `{i}` replaced by 0..count-1."""
    rows = list(rows)
    return [r._replace(ours=r.ours.format(i=i), torch=r.torch.format(i=i)) for i in range(count) for r in rows]


def below(module: str, rows: Iterable[Row]) -> list[Row]:
    """Returns rows whose paths of ours are in a module."""
    return [row._replace(ours=f"{module}/{row.ours}") for row in rows]


class View(Mapping[str, np.ndarray]):
    """Tensors under other names; `names` are {new: old}. A tensor is read from `tensors` when it is used."""

    def __init__(self, tensors: Mapping[str, np.ndarray], names: Mapping[str, str]):
        self._tensors, self._names = tensors, names

    def __getitem__(self, name: str) -> np.ndarray:
        return self._tensors[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def within(tensors: Mapping[str, np.ndarray], prefix: str) -> View:
    """Returns the tensors whose names start with a prefix, under names without it."""
    return View(tensors, {name.removeprefix(prefix): name for name in tensors if name.startswith(prefix)})


def from_torch(rows: Iterable[Row], tensors: Mapping[str, np.ndarray], num_heads: int, ignore: Iterable[str] = ()):
    """Returns our nested tree from PyTorch tensors.

    Args:
      ignore: prefixes of names that may be left over.

    Raises:
      UserError: names are missing or left over (the message lists both), or a tensor does not divide into the heads.
    """
    rows = list(rows)
    wanted = {row.torch for row in rows}
    missing = sorted(wanted - set(tensors))
    extra = sorted(name for name in set(tensors) - wanted if not name.startswith(tuple(ignore)))
    if missing or extra:
        raise UserError(
            "these weights do not fit the model.\n"
            f"  missing in the file ({len(missing)}): {', '.join(missing) or 'none'}\n"
            f"  not known to the model ({len(extra)}): {', '.join(extra) or 'none'}"
        )
    flat = {}
    for row in rows:
        tensor, heads = tensors[row.torch], row.heads or num_heads
        try:
            flat[row.ours] = LAYOUTS[row.layout][0](tensor, heads)
        except ValueError as error:
            raise UserError(f"{row.torch} {tensor.shape} cannot be split into the model's {heads} heads") from error
    return traverse_util.unflatten_dict(flat, sep="/")


def to_torch(rows: Iterable[Row], params: Mapping) -> Tensors:
    """The inverse of `from_torch`: returns arrays by PyTorch name. It can be traced, for names and shapes alone."""
    flat = traverse_util.flatten_dict(params, sep="/")
    return {row.torch: LAYOUTS[row.layout][1](flat[row.ours]) for row in rows}
