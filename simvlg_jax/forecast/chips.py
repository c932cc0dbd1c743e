"""What TPU chips can do at most, and how the chips of a slice are wired: for estimates before a run.

Figures are the ones Google publishes for each version (cloud.google.com/tpu/docs); those of v6e and v4 are rounded.
"""

from dataclasses import dataclass
from math import prod

from simvlg_jax.utils.errors import UserError

# Environment for libtpu as a compiler alone: else it looks for a TPU, and for other programs that use it.
COMPILE_ONLY = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # any: where it is unset, libtpu complains
    "TPU_WORKER_HOSTNAMES": "localhost",
}


@dataclass(frozen=True)
class Chip:
    """One kind of chip.

    Attributes:
      flops: dense bfloat16 FLOP/s.
      usable_bytes: memory that the compiler gives to a program, as it says when a program needs more.
      hbm_bandwidth: bytes/s.
      link_bandwidth: bytes/s of one inter-chip link, one way.
      dcn_bandwidth: bytes/s between slices, one way, a chip's share of its host's network.
      dimensions: of the torus that chips are wired into; two links a dimension.
    """

    flops: float
    usable_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    dcn_bandwidth: float
    dimensions: int


CHIPS = {
    "v4": Chip(275e12, int(30.75 * 2**30), 1.2e12, 5e10, 6.25e9, 3),
    "v5e": Chip(197e12, int(15.75 * 2**30), 8.19e11, 5e10, 3.125e9, 2),
    "v5p": Chip(459e12, int(95.73 * 2**30), 2.765e12, 1e11, 6.25e9, 3),
    "v6e": Chip(918e12, int(31.24 * 2**30), 1.6e12, 1e11, 12.5e9, 2),
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
        """Bytes/s that leave one chip in a collective over `group` chips of the slice.

        Over all of them: all its links, at the edge of the slice where there are fewest (a 2D slice is closed to a
        ring along a side of 16, a 3D one if all its sides are multiples of 4; else a chip at the edge has one link
        along it). Over fewer chips: one link, since which ones the compiler takes is not known.
        """
        if group < self.num_chips:
            return self.chip.link_bandwidth
        if self.chip.dimensions == 2:
            closed = [side == 16 for side in self.shape]
        else:
            closed = [all(side % 4 == 0 for side in self.shape)] * len(self.shape)
        links = sum(2 if ring else 1 for side, ring in zip(self.shape, closed, strict=True) if side > 1)
        return links * self.chip.link_bandwidth


def parse_topology(name: str) -> Topology:
    """ "v5e:4x4" -> Topology.

    Raises:
      UserError (status 2): no such chip, or sides that are no whole numbers or not as many as it has dimensions.
    """
    kind, _, sides = name.partition(":")
    if kind not in CHIPS:
        raise UserError(f"no TPU {kind!r} is known in {name!r}; a topology is one of {', '.join(CHIPS)}, as v5e:4x4", 2)
    shape = tuple(int(side) if side.isdigit() else 0 for side in sides.split("x"))
    if len(shape) != CHIPS[kind].dimensions or 0 in shape:
        example = "x".join(["4"] * CHIPS[kind].dimensions)
        raise UserError(f"{name!r}: {kind} slices have {CHIPS[kind].dimensions} sides, as in {kind}:{example}", 2)
    return Topology(name, CHIPS[kind], kind, shape)
