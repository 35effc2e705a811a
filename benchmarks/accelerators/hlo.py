"""Bytes that a compiled program moves, read from its optimized text.

XLA divides a program into kernels: fusions, convolutions, copies and so on. What is inside a kernel
stays in registers; each kernel reads its operands from memory and writes its results there. So the
text tells how many bytes the program moves at least:

- a kernel's operands and results count once each, in full tiles where the layout has tiles;
- an operand of which only slices are used counts as much as the slices;
- an array that is updated in place counts as much as the update;
- a loop counts as often as it runs;
- of the branches of a conditional the one that moves least counts. jaxnorm has one conditional,
  whose other branch is for data that the sample of a mean misjudges (core/moments.py);
- on a TPU an array in memory space 1 is in VMEM, on the chip, and counts apart.
"""

import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

BITS = {"pred": 8, "f8": 8, "bf16": 16, "f16": 16, "c64": 64, "c128": 128, "token": 0}
ON_CHIP = "S(1)"
# These name arrays, or hold what other computations or kernels move.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier",
    "partition-id", "replica-id", "while", "conditional", "call", "async-start", "async-update",
    "add-dependency", "domain",
}  # fmt: skip
SLICES = {"slice", "dynamic-slice", "gather"}
# Copies between memories; their results name the source again.
STARTS = {"copy-start", "slice-start"}
# What does not change which elements are needed.
ELEMENTWISE = {"bitcast", "convert", "copy", "reshape", "transpose", "negate"}


class Array(NamedTuple):
    """An array in memory.

    Attributes:
      elements: how many it has.
      bytes: its size, with the padding of tiles.
      on_chip: whether it is in VMEM.
    """

    elements: int
    bytes: int
    on_chip: bool


class Instruction(NamedTuple):
    """One line of a program."""

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    def called(self, *roles: str) -> list[str]:
        """The computations that the attributes of these names call."""
        found = []
        for role in roles:
            for listed in re.findall(rf"\b{role}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes):
                found += re.findall(r"[\w.\-]+", listed.replace("%", ""))
        return found


class Traffic(NamedTuple):
    """What a program moves.

    Attributes:
      main: bytes to and from main memory.
      chip: bytes to and from VMEM.
      reads: for each array that a kernel reads from main memory, its elements and how often.
      writes: the same for those that are written.
      kernels: how many there are; a GPU needs a few microseconds to start each.
    """

    main: float = 0.0
    chip: float = 0.0
    reads: tuple[tuple[float, float], ...] = ()
    writes: tuple[tuple[float, float], ...] = ()
    kernels: float = 0.0

    def plus(self, other: "Traffic") -> "Traffic":
        """Both, one after the other."""
        return Traffic(
            self.main + other.main,
            self.chip + other.chip,
            self.reads + other.reads,
            self.writes + other.writes,
            self.kernels + other.kernels,
        )

    def times(self, count: float) -> "Traffic":
        """That of a loop."""
        many = lambda moves: tuple((size, count * times) for size, times in moves)
        return Traffic(
            count * self.main,
            count * self.chip,
            many(self.reads),
            many(self.writes),
            count * self.kernels,
        )

    def passes(self, elements: int) -> float:
        """How many arrays of at least so many elements are read."""
        return sum(times for size, times in self.reads if size >= elements)


class Program:
    """The computations of an optimized program, by name."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
                current = self.computations[head[2]] = {}
                self.entry = head[2] if head[1] else self.entry
            elif " = " in line and line.startswith("  "):
                instruction = _instruction(line)
                current[instruction.name] = instruction
        if not self.entry:
            raise ValueError("the text must be that of an optimized program, got no ENTRY in it.")

    def traffic(self) -> Traffic:
        """What the whole program moves."""
        return self._of_computation(self.entry)

    @functools.cache  # noqa: B019 (programs are few, and live as long as their counts)
    def _of_computation(self, name: str) -> Traffic:
        instructions = self.computations[name].values()
        return functools.reduce(
            Traffic.plus, (self._of_instruction(name, i) for i in instructions), Traffic()
        )

    def _of_instruction(self, computation: str, each: Instruction) -> Traffic:
        if each.opcode == "while":
            (body,) = each.called("body")
            return self._of_computation(body).times(self._trips(each))
        if each.opcode == "conditional":
            roles = "branch_computations", "true_computation", "false_computation"
            branches = [self._of_computation(name) for name in each.called(*roles)]
            return min(branches, key=lambda traffic: traffic.main)
        if each.opcode in ("call", "async-start"):
            called = each.called("to_apply", "calls")
            return functools.reduce(Traffic.plus, map(self._of_computation, called), Traffic())
        if each.opcode in FREE or each.opcode.endswith(("-done", "-update")):
            return Traffic()
        return self._of_kernel(computation, each)

    def _of_kernel(self, computation: str, kernel: Instruction) -> Traffic:
        reads = list(self._reads(computation, kernel))
        writes = list(self._writes(computation, kernel))
        if kernel.opcode in STARTS:
            (source,) = reads
            copy = next((a for a in writes if a.elements > 1 and a != source), source)
            reads, writes = [copy._replace(on_chip=source.on_chip)], [copy]
        total = lambda on_chip: sum(a.bytes for a in reads + writes if a.on_chip == on_chip)
        moves = lambda arrays: tuple((a.elements, 1.0) for a in arrays if not a.on_chip)
        return Traffic(total(False), total(True), moves(reads), moves(writes), 1.0)

    def _reads(self, computation: str, kernel: Instruction) -> Iterator[Array]:
        scope = self.computations[computation]
        # An array that has two names is read once.
        names = {_buffer(scope, name): name for name in kernel.operands}
        for name in names.values():
            for array in _arrays_of(scope, name):
                if kernel.opcode in SLICES and name == kernel.operands[0]:
                    array = _part(array, kernel.results)
                elif kernel.opcode == "fusion":
                    array = self._used(kernel, kernel.operands.index(name), array)
                elif kernel.opcode == "dynamic-update-slice" and name == kernel.operands[0]:
                    continue
                yield array

    def _used(self, fusion: Instruction, operand: int, array: Array) -> Array:
        """The part of an operand of a fusion that is used."""
        (called,) = fusion.called("calls")
        inside = self.computations[called]
        (name,) = (
            each.name
            for each in inside.values()
            if each.opcode == "parameter" and each.attributes.startswith(f"{operand})")
        )
        parts = self._slices(inside, name)
        return array if parts is None else _part(array, parts)

    def _slices(self, scope: dict[str, Instruction], name: str) -> tuple[Array, ...] | None:
        """The slices that are taken of an array, or None if the whole of it is used."""
        found: tuple[Array, ...] = ()
        for user in scope.values():
            if name not in user.operands:
                continue
            if user.opcode in SLICES and user.operands[0] == name:
                more = user.results
            elif user.opcode in ELEMENTWISE and not user.is_root:
                more = self._slices(scope, user.name)
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                more = ()  # the rest stays where it is
            elif user.opcode == "fusion":
                (called,) = user.called("calls")
                inside = self.computations[called]
                names = [
                    each.name
                    for each in inside.values()
                    if each.opcode == "parameter"
                    and each.attributes.startswith(f"{user.operands.index(name)})")
                ]
                more = self._slices(inside, names[0])
            else:
                return None
            if more is None:
                return None
            found += more
        return found

    def _writes(self, computation: str, kernel: Instruction) -> Iterator[Array]:
        if kernel.opcode == "dynamic-update-slice":
            yield from _arrays_of(self.computations[computation], kernel.operands[1])
            return
        roots = [None] * len(kernel.results)
        if kernel.opcode == "fusion":
            inside = self.computations[kernel.called("calls")[0]]
            root = next(each for each in inside.values() if each.is_root)
            names = root.operands if root.opcode == "tuple" else (root.name,)
            roots = [_updated(inside, name) for name in names]
            if len(roots) != len(kernel.results):
                roots = [None] * len(kernel.results)
        for result, root in zip(kernel.results, roots, strict=True):
            if (
                kernel.opcode == "custom-call"
                and len(kernel.results) > 1
                and result.elements == result.bytes
            ):
                continue  # the workspace of a library, in bytes
            yield result if root is None else _part(result, root)

    def _trips(self, loop: Instruction) -> int:
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(known[1])
        (condition,) = loop.called("condition")
        limits = [
            int(each.attributes.split(")")[0])
            for each in self.computations[condition].values()
            if each.opcode == "constant" and re.match(r"\d+\)", each.attributes)
        ]
        if len(limits) != 1:
            raise ValueError(f"a loop must tell how often it runs, got {loop.attributes[:200]}")
        return limits[0]


def _buffer(scope: dict[str, Instruction], name: str) -> str:
    """The instruction that made an array, whatever has renamed it since."""
    each, places = scope.get(name), []
    while each is not None:
        if each.opcode == "get-tuple-element":
            (place,) = re.findall(r"index=(\d+)", each.attributes)
            places.append(int(place))
        elif each.opcode == "tuple" and places:
            each = scope.get(each.operands[places.pop()])
            continue
        elif each.opcode not in ("bitcast", "opt-barrier"):
            break
        name, each = each.operands[0], scope.get(each.operands[0])
    return f"{each.name if each else name} {places}"


def _updated(scope: dict[str, Instruction], name: str) -> tuple[Array, ...] | None:
    """The updates, where a result is an array that is updated in place."""
    each = scope[name]
    while each.opcode == "bitcast":
        each = scope[each.operands[0]]
    return scope[each.operands[1]].results if each.opcode == "dynamic-update-slice" else None


def _part(array: Array, parts: tuple[Array, ...]) -> Array:
    elements = min(array.elements, sum(part.elements for part in parts))
    part = round(array.bytes * elements / max(array.elements, 1))
    return array._replace(elements=elements, bytes=part)


def _arrays_of(scope: dict[str, Instruction], name: str) -> tuple[Array, ...]:
    return scope[name].results if name in scope else ()


def _instruction(line: str) -> Instruction:
    head, _, rest = line.strip().partition(" = ")
    type_end = _end(rest, " ")
    kind, rest = rest[:type_end], rest[type_end + 1 :]
    opcode, _, rest = rest.partition("(")
    end = _end(rest, ")")
    operands = re.findall(r"%([\w.\-]+)", rest[:end])
    # Of parameters and constants, the number or value stands where operands do.
    attributes = rest if opcode in ("parameter", "constant") else rest[end + 1 :]
    name = head.removeprefix("ROOT ").lstrip("%")
    arrays = tuple(map(_array, re.findall(r"(\w+)\[([\d,]*)\](\{[^}]*\})?", kind)))
    return Instruction(name, opcode, arrays, tuple(operands), attributes, head.startswith("ROOT"))


def _end(text: str, stop: str) -> int:
    """Where the first `stop` is outside of all brackets."""
    depth = 0
    for place, character in enumerate(text):
        if depth == 0 and character == stop:
            return place
        depth += (character in "([{") - (character in ")]}")
    return len(text)


def _array(found: tuple[str, str, str]) -> Array:
    dtype, sizes, layout = found
    shape = [int(size) for size in sizes.split(",") if size]
    padded = list(shape)
    if order := re.match(r"\{([\d,]*):T\(([\d,]+)\)", layout):
        minor_first = [int(axis) for axis in order[1].split(",") if axis]
        tile = [int(size) for size in order[2].split(",")]
        for axis, size in zip(minor_first, reversed(tile), strict=False):
            padded[axis] = -(-shape[axis] // size) * size
    bits = next((n for key, n in BITS.items() if dtype.startswith(key)), None)
    if bits is None:
        bits = int(re.sub(r"\D", "", dtype))
    size = math.prod(padded) * max(bits, 8) // 8 if bits else 0
    return Array(math.prod(shape), size, ON_CHIP in layout)
