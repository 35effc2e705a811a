"""Read the collectives of a compiled program from its text."""

import math
import re
from typing import Any, NamedTuple

import jax

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8, "c64": 8}


class Collective(NamedTuple):
    """One collective operation.

    Attributes:
      kind: its name in XLA.
      numbers: how many numbers each device contributes.
      bytes: the size of these numbers.
      devices: how many devices there are in a group.
    """

    kind: str
    numbers: int
    bytes: int
    devices: int

    @property
    def bytes_sent(self) -> float:
        """The fewest bytes that each device sends, with a ring algorithm."""
        others = self.devices - 1
        rounds = {"all-gather": others, "all-reduce": 2 * others / self.devices}
        rounds["collective-permute"] = 1
        return self.bytes * rounds.get(self.kind, others / self.devices)


def collectives(f: Any, *args: Any) -> list[Collective]:
    """Return the collectives in the compiled program of `jax.jit(f)` for these arguments."""
    return collectives_of(jax.jit(f).lower(*args).compile().as_text() or "")


def collectives_of(text: str) -> list[Collective]:
    """Return the collectives in the text of a compiled program."""
    found = re.findall(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\((.*)", text)
    return [_collective(shapes, kind, rest, bool(start)) for shapes, kind, start, rest in found]


def _collective(result: str, kind: str, rest: str, start: bool) -> Collective:
    devices = _group_size(rest)
    arrays = [
        (BYTES[dtype], math.prod(map(int, filter(None, sizes.split(",")))))
        for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", result)
    ]
    if start and kind == "all-gather":
        arrays = arrays[len(arrays) // 2 :]  # the operands come first
    # Result and contribution differ in size by the number of devices.
    share = {"all-gather": 1 / devices, "reduce-scatter": devices}.get(kind, 1)
    numbers = round(share * sum(count for _, count in arrays))
    return Collective(
        kind, numbers, round(share * sum(size * count for size, count in arrays)), devices
    )


def _group_size(rest: str) -> int:
    """Return the number of devices in a group, for each way that XLA writes replica groups."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(listed[1].split(","))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(iota[2])
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(.*?\))? \{(.*?)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", mesh[2]))
    if "source_target_pairs=" in rest:
        return 2
    raise ValueError(f"unknown replica groups: {rest}")
