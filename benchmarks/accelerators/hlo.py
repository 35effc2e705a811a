"""Count the bytes that a compiled program moves, from its optimized text.

XLA divides a program into kernels: fusions, convolutions, copies and so on. What is inside a kernel
stays in registers; each kernel reads its operands from memory and writes its results there. The
count is a lower bound:

- a kernel's operands and results count once each, in full tiles where the layout has tiles;
- an operand counts as much as its slices if nothing else of it is used;
- an array that is updated in place counts as much as the update;
- a loop counts as often as it runs;
- of the branches of a conditional, the one that moves least counts;
- on a TPU, an array in memory space 1 is in VMEM, on the chip, and is counted separately.
"""

import functools
import re
from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.accelerators.hlo_text import Array, Instruction, instruction_of, part_of

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


class Traffic(NamedTuple):
    """The memory traffic of a program.

    Attributes:
      main: bytes to and from main memory.
      chip: bytes to and from VMEM.
      reads: for each array that a kernel reads from main memory, its elements and how often.
      writes: the same for those that are written.
      kernels: how many there are; a GPU takes a few microseconds to start each.
    """

    main: float = 0.0
    chip: float = 0.0
    reads: tuple[tuple[float, float], ...] = ()
    writes: tuple[tuple[float, float], ...] = ()
    kernels: float = 0.0

    def plus(self, other: "Traffic") -> "Traffic":
        """Add the traffic of another program."""
        return Traffic(
            self.main + other.main,
            self.chip + other.chip,
            self.reads + other.reads,
            self.writes + other.writes,
            self.kernels + other.kernels,
        )

    def times(self, count: float) -> "Traffic":
        """Return the traffic of a loop that runs `count` times."""
        many = lambda moves: tuple((size, count * times) for size, times in moves)
        return Traffic(
            count * self.main,
            count * self.chip,
            many(self.reads),
            many(self.writes),
            count * self.kernels,
        )

    def passes(self, elements: int) -> float:
        """Count the reads of arrays of at least `elements` elements."""
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
                instruction = instruction_of(line)
                current[instruction.name] = instruction
        if not self.entry:
            raise ValueError("the text must be that of an optimized program, got no ENTRY in it.")

    def traffic(self) -> Traffic:
        """Return the traffic of the whole program."""
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
                    array = part_of(array, kernel.results)
                elif kernel.opcode == "fusion":
                    array = self._used(kernel, kernel.operands.index(name), array)
                elif kernel.opcode == "dynamic-update-slice" and name == kernel.operands[0]:
                    continue
                yield array

    def _used(self, fusion: Instruction, operand: int, array: Array) -> Array:
        """Return the part of a fusion's operand that is used."""
        (called,) = fusion.called("calls")
        inside = self.computations[called]
        (name,) = (
            each.name
            for each in inside.values()
            if each.opcode == "parameter" and each.attributes.startswith(f"{operand})")
        )
        parts = self._slices(inside, name)
        return array if parts is None else part_of(array, parts)

    def _slices(self, scope: dict[str, Instruction], name: str) -> tuple[Array, ...] | None:
        """Return the slices of an array that are used, or None if all of it is used."""
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
            yield result if root is None else part_of(result, root)

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
    """Name the instruction that computes an array, through tuples and bitcasts."""
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
    """Return the updates of a result that is an array updated in place, or None."""
    each = scope[name]
    while each.opcode == "bitcast":
        each = scope[each.operands[0]]
    return scope[each.operands[1]].results if each.opcode == "dynamic-update-slice" else None


def _arrays_of(scope: dict[str, Instruction], name: str) -> tuple[Array, ...]:
    return scope[name].results if name in scope else ()
