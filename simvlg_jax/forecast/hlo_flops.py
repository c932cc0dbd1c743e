"""The FLOPs of the matrix products of a compiled program, from its HLO text.

On a TPU, matrix products are compiled to convolutions. A batched product becomes a convolution with the batch as a
dilated spatial dimension. At each output position, all window elements but one hit padding and are not counted.
A Pallas kernel states its FLOPs.
"""

import re
from math import prod

from simvlg_jax.forecast.hlo import Instruction, Program, array_shape, runs, with_fused


def matrix_flops(program: Program) -> tuple[int, int]:
    """Returns (the FLOPs of one chip in a step, those of products of int8 and int8, which are not in the first).

    They are two per multiplication of two elements, and none for padding.
    """
    count = {"convolution": _convolution, "dot": _dot, "custom-call": _stated}
    total = {True: 0, False: 0}
    for name, times in runs(program).items():
        for body, instruction in with_fused(program, name):
            if instruction.op in count:
                types = [body[operand].type for operand in instruction.operands[:2]]
                int8 = bool(types) and all(each.startswith(("s8[", "u8[")) for each in types)
                total[int8] += times * count[instruction.op](body, instruction)
    return total[False], total[True]


def _stated(body: dict[str, Instruction], call: Instruction) -> int:
    found = re.search(r'"cost_estimate":\{"flops":"(\d+)"', call.attributes)
    return int(found[1]) if found else 0


def _dot(body: dict[str, Instruction], dot: Instruction) -> int:
    left = array_shape(body[dot.operands[0]].type)
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.attributes)[1]
    return 2 * prod(array_shape(dot.type)) * prod(left[int(axis)] for axis in contracted.split(",") if axis)


def _convolution(body: dict[str, Instruction], convolution: Instruction) -> int:
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.attributes).groups()
    types = [body[name].type for name in convolution.operands[:2]] + [convolution.type]
    left, kernel, out = (dict(zip(names, array_shape(t), strict=True)) for names, t in zip(labels, types, strict=True))
    found = re.search(r"window=\{([^}]*)\}", convolution.attributes)
    window = {key: value.split("x") for key, value in re.findall(r"(\w+)=(\S+)", found[1] if found else "")}
    flops = 2 * out["b"] * out["f"] * kernel["i"]
    for axis in range(len(labels[1]) - 2):
        stride, dilation, kernel_dilation = (
            int(window[key][axis]) if key in window else 1 for key in ("stride", "lhs_dilate", "rhs_dilate")
        )
        pad = int(window["pad"][axis].partition("_")[0]) if "pad" in window else 0
        place = str(axis)
        flops *= sum(
            0 <= (at := o * stride + k * kernel_dilation - pad) <= (left[place] - 1) * dilation and at % dilation == 0
            for o in range(out[place])
            for k in range(kernel[place])
        )
    return flops
