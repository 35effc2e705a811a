"""Parse the lines of a program that XLA has optimized (HLO)."""

import math
import re
from typing import NamedTuple

BITS = {"pred": 8, "f8": 8, "bf16": 16, "f16": 16, "c64": 64, "c128": 128, "token": 0}
ON_CHIP = "S(1)"


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
        """Return the computations that the attributes of these names call."""
        found = []
        for role in roles:
            for listed in re.findall(rf"\b{role}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes):
                found += re.findall(r"[\w.\-]+", listed.replace("%", ""))
        return found


def part_of(array: Array, parts: tuple[Array, ...]) -> Array:
    """Return the part of an array that slices of it take."""
    elements = min(array.elements, sum(part.elements for part in parts))
    part = round(array.bytes * elements / max(array.elements, 1))
    return array._replace(elements=elements, bytes=part)


def instruction_of(line: str) -> Instruction:
    """Parse a line such as `%name = f32[8]{0} add(%a, %b), attributes`."""
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
    """Find the first `stop` outside of all brackets."""
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
