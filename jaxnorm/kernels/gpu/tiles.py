"""The division of rows among the threads of a GPU, in plain numbers, without Pallas.

A warpgroup of 128 threads computes four or more rows, and each row belongs to one of its four
warps. A long row is divided into segments, one for each warp of one or more warpgroups, which
exchange their sums through shared memory.
"""

from typing import NamedTuple

WARPS, LANES = 4, 32  # warps in a warpgroup, lanes in a warp
VECTOR_BYTES = 16  # the size of one load
ELEMENTS = 32  # the most elements of x that a thread holds
WARPGROUPS = 2  # the most for one row; with four, a thread has too few registers
WIDTHS = (
    "rows of a multiple of 64 elements up to 1024 (if 4 divides their number), of 256 up to 4096, "
    "or of 512 up to 8192"
)
MULTIPROCESSORS = 132  # of an H100
REGISTERS = 65536  # of a multiprocessor


class Tile(NamedTuple):
    """The part of x that a program computes at a time: whole rows, or one row in segments.

    Attributes:
      rows: the number of rows.
      k: the length of a row.
      segments: the number of segments of each row.
      vector: the number of elements that a thread loads at once.
    """

    rows: int
    k: int
    segments: int
    vector: int

    @property
    def warpgroups(self) -> int:
        """Return the number of warpgroups that share the segments of a row."""
        return max(1, self.segments // WARPS)

    @property
    def shape(self) -> tuple[int, int]:
        """Return the number of segments that a warpgroup holds, and their length."""
        return (self.rows if self.segments == 1 else WARPS, self.k // self.segments)

    @property
    def programs(self) -> int:
        """Return the number of programs of the backward pass that run at once.

        Registers limit it: a thread holds elements of x, dy and scale, two sums of the same size,
        products, and indices.
        """
        elements = self.shape[0] * self.shape[1] // (WARPS * LANES)
        threads = WARPS * LANES * self.warpgroups
        return MULTIPROCESSORS * max(1, REGISTERS // (threads * (5 * elements + 48)))


def tile(rows: int, k: int, most: int = 4) -> Tile | None:
    """Return the tile for rows of k elements, or None if the kernel does not support them.

    A thread loads two to `most` elements at once; one at a time is too slow. Rows are divided into
    segments if the warps do not divide their number, or if they are long. WIDTHS has the sizes that
    this supports.
    """
    warp = LANES * ELEMENTS
    candidates = [1] if rows % WARPS == 0 and k <= warp else []
    candidates += [WARPS * n for n in (1, WARPGROUPS) if k <= n * WARPS * warp]
    for segments in candidates:
        for vector in (8, 4, 2):
            if vector <= most and k % (segments * LANES * vector) == 0:
                at_once = WARPS if segments == 1 else 1
                while at_once > 1 and rows % (2 * at_once) == 0 and 2 * at_once * k <= WARPS * warp:
                    at_once *= 2
                return Tile(at_once, k, segments, vector)
    return None
