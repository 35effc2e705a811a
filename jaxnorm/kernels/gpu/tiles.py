"""How rows are divided among the threads of a GPU: a few numbers, known before Pallas is imported.

A warpgroup, 128 threads, takes four rows or more, and each of its four warps has its own. A long
row is taken in segments, one for each warp of one or more warpgroups, which exchange their sums
through shared memory.
"""

from typing import NamedTuple

WARPS, LANES = 4, 32  # of a warpgroup, of a warp
VECTOR_BYTES = 16  # of one load
ELEMENTS = 32  # of x, at most, that a thread keeps
WARPGROUPS = 2  # at most, for one row; with four a thread has too few registers
WIDTHS = (
    "rows of a multiple of 64 elements up to 1024 (if 4 divides their number), of 256 up to 4096, "
    "or of 512 up to 8192"
)
MULTIPROCESSORS = 132  # of an H100
REGISTERS = 65536  # of each


class Tile(NamedTuple):
    """What a program takes at a time: `rows` whole rows, or one row in `segments`.

    Attributes:
      rows: how many.
      k: the length of a row.
      segments: of each row.
      vector: how many elements a thread loads at once.
    """

    rows: int
    k: int
    segments: int
    vector: int

    @property
    def warpgroups(self) -> int:
        """How many share the segments of a row."""
        return max(1, self.segments // WARPS)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the segments that a warpgroup has: how many, and their length."""
        return (self.rows if self.segments == 1 else WARPS, self.k // self.segments)

    @property
    def programs(self) -> int:
        """How many run at the same time, backward: as many as there are registers for.

        A thread has some elements of x, dy and scale, two sums of as many, products, and indices.
        """
        elements = self.shape[0] * self.shape[1] // (WARPS * LANES)
        threads = WARPS * LANES * self.warpgroups
        return MULTIPROCESSORS * max(1, REGISTERS // (threads * (5 * elements + 48)))


def tile(rows: int, k: int, most: int = 4) -> Tile | None:
    """How so many rows of k elements are taken, or None if they can't be.

    A thread loads two to `most` elements at once; one at a time is too slow. Few rows, or a number
    that the warps do not divide, are taken in segments. WIDTHS says what that makes.
    """
    warp = LANES * ELEMENTS
    fits = [1] if rows % WARPS == 0 and k <= warp else []
    fits += [WARPS * n for n in (1, WARPGROUPS) if k <= n * WARPS * warp]
    for segments in fits:
        for vector in (8, 4, 2):
            if vector <= most and k % (segments * LANES * vector) == 0:
                at_once = WARPS if segments == 1 else 1
                while at_once > 1 and rows % (2 * at_once) == 0 and 2 * at_once * k <= WARPS * warp:
                    at_once *= 2
                return Tile(at_once, k, segments, vector)
    return None
