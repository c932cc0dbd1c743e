"""Collectives and memory traffic of a compiled program, from its HLO text.

XLA's own cost analysis counts the body of a loop once. Here it counts once per iteration.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
BYTES |= {"s64": 8, "u64": 8, "f64": 8, "s4": 0.5, "u4": 0.5, "f8e4m3fn": 1, "f8e5m2": 1}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "send")

# Types with layouts contain no "=" and no word before a parenthesis, so the first word before "(" is the operation.
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclass(frozen=True)
class Instruction:
    """name = type op(inside), attributes."""

    name: str
    type: str
    op: str
    inside: str
    attributes: str

    @property
    def operands(self) -> list[str]:
        return _NAME.findall(self.inside)

    def called(self, *roles: str) -> list[str]:
        """Returns the computations that the attributes name in any of these roles."""
        return re.findall(rf"(?:{'|'.join(roles)})=%([\w.\-]+)", self.attributes)


@dataclass
class Program:
    """The computations of a program by name, and the name of the entry computation."""

    entry: str
    computations: dict[str, dict[str, Instruction]] = field(default_factory=dict)


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind over groups of one size.

    Attributes:
      op: "all-reduce", ...; "send" is a transfer between slices.
      count: per step.
      bytes: output size on one chip per step, not the bytes sent: the full array, except for reduce-scatter, whose
        output is one shard.
      group: number of chips that take part in each.
    """

    op: str
    count: int
    bytes: int
    group: int

    @property
    def wire_bytes(self) -> float:
        """Bytes that a chip sends if the collective runs as a ring."""
        share = (self.group - 1) / self.group
        factor = {"all-reduce": 2 * share, "reduce-scatter": self.group - 1}
        return self.bytes * factor.get(self.op, 1 if self.op in ("collective-permute", "send") else share)


def parse(text: str) -> Program:
    """Parses HLO text, in the format of `jax.stages.Compiled.as_text`."""
    program, body = Program(""), {}
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            body = program.computations.setdefault(found[2], {})
            if found[1]:
                program.entry = found[2]
        elif found := _INSTRUCTION.match(line):
            body[found[1]] = Instruction(*found.group(1, 2, 3), *_close(found[4]))
    return program


def _close(rest: str) -> tuple[str, str]:
    """Splits "a, b), more" at the parenthesis that closes the operands."""
    depth = 1
    for index, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if not depth:
            return rest[:index], rest[index + 1 :]
    return rest, ""


def array_bytes(type_text: str, *, hbm_only: bool = False) -> int:
    """Returns the bytes of all arrays in a type. `hbm_only` excludes on-chip memory of a TPU: S(1) and above."""
    total = 0
    for dtype, shape, layout in _ARRAY.findall(type_text):
        if dtype in BYTES and not (hbm_only and "S(" in layout):
            total += int(prod(int(n) for n in shape.split(",") if n) * BYTES[dtype])
    return total


def array_shape(type_text: str) -> tuple[int, ...]:
    """Returns the shape of the first array in a type."""
    return tuple(int(n) for n in _ARRAY.search(type_text)[2].split(",") if n)


def runs(program: Program) -> dict[str, int]:
    """Returns how often a step runs each computation outside of fusions."""
    runs: dict[str, int] = defaultdict(int)

    def visit(name: str, times: int) -> None:
        runs[name] += times
        for instruction in program.computations[name].values():
            if instruction.op == "while":
                (condition,), (body,) = instruction.called("condition"), instruction.called("body")
                visit(body, times * _trips(program, condition))
            elif instruction.op in ("call", "async-start", "conditional"):
                for called in instruction.called("to_apply", "calls", "true_computation", "false_computation"):
                    visit(called, times)
                for called in re.findall(r"branch_computations=\{([^}]*)\}", instruction.attributes):
                    for branch in _NAME.findall(called):
                        visit(branch, times)

    visit(program.entry, 1)
    return runs


def _trips(program: Program, condition: str) -> int:
    """Returns the trip count of a loop: the constant in its condition, or 1 if there is none."""
    body = program.computations[condition].values()
    return max((int(i.inside) for i in body if i.op == "constant" and i.type.startswith("s32[]")), default=1)


def with_fused(program: Program, name: str) -> Iterator[tuple[dict[str, Instruction], Instruction]]:
    """Yields (computation, instruction) of a computation and of the fusions in it."""
    body = program.computations[name]
    for instruction in body.values():
        yield body, instruction
        if instruction.op == "fusion":
            for called in instruction.called("calls"):
                yield from with_fused(program, called)


def collectives(program: Program, num_chips: int) -> list[Collective]:
    """Returns the collectives of a step, summed by kind and group size, the largest first.

    An asynchronous collective appears several times in the text with the same channel: at its start, within the work
    that it overlaps, and at its end. It is counted once.
    """
    totals: dict[tuple[str, int], list[int]] = defaultdict(lambda: [0, 0])
    for name, times in runs(program).items():
        seen = set()
        for body, instruction in with_fused(program, name):
            op = instruction.op.removesuffix("-start")
            channel = re.search(r"channel_id=(\d+)|$", instruction.attributes)[1]
            if op not in COLLECTIVES or (op, channel) in seen:
                continue
            seen |= {(op, channel)} if channel else set()
            size = array_bytes(instruction.type)
            if instruction.op != op or op == "send":  # asynchronous: its type is a tuple of operand and result
                operand = sum(array_bytes(body[o].type) for o in instruction.operands)
                size = operand if op in ("send", "collective-permute", "all-reduce") else size - operand
            total = totals[op, _group_size(instruction.attributes, num_chips)]
            total[0] += times
            total[1] += times * size
    found = [Collective(op, count, size, group) for (op, group), (count, size) in totals.items()]
    return sorted(found, key=lambda c: -c.bytes)


def _group_size(attributes: str, num_chips: int) -> int:
    """Returns the number of chips in a group, from any notation of replica_groups; all chips if it is absent."""
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        return prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", found[2]))
    return num_chips


FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional")


def hbm_traffic(program: Program) -> int:
    """Returns the bytes that a step reads from and writes to the memory of a chip.

    These are the operands and results of all operations. If an operation only reads or updates slices of an operand,
    only the slices count.
    """
    return sum(
        times * _traffic(program, name, instruction)
        for name, times in runs(program).items()
        for instruction in program.computations[name].values()
        if instruction.op not in FREE and not instruction.op.endswith("-done")
    )


def _traffic(program: Program, where: str, instruction: Instruction) -> int:
    body = program.computations[where]
    result = array_bytes(instruction.type, hbm_only=True)
    if instruction.op.endswith("-start"):  # its result includes its operand
        return result
    for number, name in enumerate(instruction.operands):
        whole = array_bytes(body[name].type, hbm_only=True)
        touched, in_place = _touched(program, body, instruction, number, whole)
        result += touched - (whole if in_place else 0)
    return max(result, 0)


def _touched(
    program: Program, body: dict[str, Instruction], user: Instruction, number: int, whole: int
) -> tuple[int, bool]:
    """Returns the bytes that `user` reads or writes of operand `number`, and whether it updates it in place."""
    if user.op == "dynamic-slice" and number == 0:
        return min(whole, array_bytes(user.type)), False
    if user.op == "dynamic-update-slice" and number == 0:
        return min(whole, array_bytes(body[user.operands[1]].type)), True
    if user.op == "fusion" and not _is_retiled(program, user):
        inner = program.computations[user.called("calls")[0]]
        name = next(i.name for i in inner.values() if i.op == "parameter" and int(i.inside) == number)
    elif user.op == "bitcast" or _is_retiled(program, user):
        inner, name = body, user.name
    else:
        return whole, False
    uses = [
        _touched(program, inner, each, index, whole)
        for each in inner.values()
        for index, operand in enumerate(each.operands)
        if operand == name
    ]
    return min(whole, sum(size for size, _ in uses)), bool(uses) and all(in_place for _, in_place in uses)


def _is_retiled(program: Program, user: Instruction) -> bool:
    """Returns whether an instruction within a fusion gives its operand, in place, another tiling and nothing else."""
    if user.op != "fusion" or "output_to_operand_aliasing={{}: (0, {})}" not in user.attributes:
        return False
    return {i.op for i in program.computations[user.called("calls")[0]].values()} <= {"parameter", "copy", "bitcast"}
