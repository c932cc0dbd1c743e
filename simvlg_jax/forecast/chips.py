"""Peak performance of TPU chips and the topology of their slices, for forecasts of a run.

Google publishes the figures for each version (cloud.google.com/tpu/docs). Those of v6e and v4 are rounded.
"""

from dataclasses import dataclass
from math import prod

from simvlg_jax.utils.errors import UserError

# Environment for libtpu as a compiler only. Without it, libtpu looks for a TPU and for other programs that use it.
COMPILE_ONLY = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # any value; libtpu warns if it is unset
    "TPU_WORKER_HOSTNAMES": "localhost",
}


@dataclass(frozen=True)
class Chip:
    """One kind of chip.

    Attributes:
      flops: dense bfloat16 FLOP/s.
      int8_flops: the same for products of int8 and int8. v4 has no faster ones.
      usable_bytes: memory that the compiler gives to a program; its error for larger programs reports this limit.
      hbm_bandwidth: bytes/s.
      link_bandwidth: bytes/s of one inter-chip link in one direction.
      dcn_bandwidth: bytes/s between slices in one direction: a chip's share of the network of its host.
      dimensions: of the torus that connects the chips, with two links per dimension.
    """

    flops: float
    int8_flops: float
    usable_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    dcn_bandwidth: float
    dimensions: int


CHIPS = {
    "v4": Chip(275e12, 275e12, int(30.75 * 2**30), 1.2e12, 5e10, 6.25e9, 3),
    "v5e": Chip(197e12, 394e12, int(15.75 * 2**30), 8.19e11, 5e10, 3.125e9, 2),
    "v5p": Chip(459e12, 918e12, int(95.73 * 2**30), 2.765e12, 1e11, 6.25e9, 3),
    "v6e": Chip(918e12, 1836e12, int(31.24 * 2**30), 1.6e12, 1e11, 12.5e9, 2),
}


@dataclass(frozen=True)
class Topology:
    """A slice such as v5e:4x4."""

    name: str
    chip: Chip
    kind: str
    shape: tuple[int, ...]

    @property
    def num_chips(self) -> int:
        return prod(self.shape)

    def ici_bandwidth(self, group: int) -> float:
        """Returns the bytes/s that one chip sends in a collective over `group` chips of the slice.

        Over the whole slice, all links of an edge chip count, since it has the fewest: two per dimension with
        wrap-around, one without. A 2D slice wraps around only along sides of 16, a 3D slice only if all sides are
        multiples of 4. Over fewer chips one link counts, since the links that the compiler uses are unknown.
        """
        if group < self.num_chips:
            return self.chip.link_bandwidth
        if self.chip.dimensions == 2:
            wraps = [side == 16 for side in self.shape]
        else:
            wraps = [all(side % 4 == 0 for side in self.shape)] * len(self.shape)
        links = sum(2 if wrap else 1 for side, wrap in zip(self.shape, wraps, strict=True) if side > 1)
        return links * self.chip.link_bandwidth


def parse_topology(name: str) -> Topology:
    """Parses a topology such as "v5e:4x4".

    Raises:
      UserError (status 2): the chip is unknown, or the sides are not one positive integer per dimension of the chip.
    """
    kind, _, sides = name.partition(":")
    if kind not in CHIPS:
        raise UserError(
            f"unknown TPU {kind!r} in {name!r}; a topology is one of {', '.join(CHIPS)} and its sides, as in v5e:4x4", 2
        )
    shape = tuple(int(side) if side.isdigit() else 0 for side in sides.split("x"))
    if len(shape) != CHIPS[kind].dimensions or 0 in shape:
        example = "x".join(["4"] * CHIPS[kind].dimensions)
        raise UserError(f"{name!r}: {kind} slices have {CHIPS[kind].dimensions} sides, as in {kind}:{example}", 2)
    return Topology(name, CHIPS[kind], kind, shape)
