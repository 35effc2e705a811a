"""How rows are divided into blocks that fit into VMEM, the memory on a TPU's chip.

A TPU stores two axes of an array in tiles of 8 x 128 numbers: the features, and the axis beside
them. XLA stores an array such that this other axis fills its tiles, if one of its axes does, and
that need not be the last but one. So the kernels take x with this axis moved there; for XLA that is
another name of the same array. Then all rows can be joined, and a block is some of them. Where no
axis fills its tiles, joining them is a copy; then x is seen as (batch, examples, positions, k), and
a block is several examples with all of their positions.
"""

import math
from typing import NamedTuple

LANES = 128  # of a tile
SUBLANES = 8  # of a tile of float32
# Bytes of VMEM that a kernel gets unasked, on the TPUs where that is least.
DEFAULT_LIMIT = 16 * 2**20
# Half of the VMEM of v5p and 7x, which have 64 MiB; v5e and v6e have 128. The generation may be
# unknown where a program is lowered, so no block is made for one of them.
LIMIT = 32 * 2**20
_SPARE = 4 * 2**20  # for what the compiler itself keeps there
_MAX_ROWS = 1024  # longer copies are no faster
_STEPS = 8  # steps of the grid that there should be, so that copying and computing overlap
_GROUP = 32 * LANES * SUBLANES  # numbers that are computed with at once: half of the registers


class Plan(NamedTuple):
    """The division of x into blocks.

    Attributes:
      leading: the shape of x without the features.
      order: how these axes are ordered for the kernel.
      shape: of x as (batch, examples, positions, k), in that order.
      examples: how many a block has.
      rows: how many positions of each of them.
      group: how many rows are computed at once.
      large: whether the kernel has to ask for more VMEM than it gets unasked.
    """

    leading: tuple[int, ...]
    order: tuple[int, ...]
    shape: tuple[int, int, int, int]
    examples: int
    rows: int
    group: int
    large: bool

    @property
    def steps(self) -> tuple[int, int]:
        """How many blocks there are along the examples and along the positions."""
        return -(-self.shape[1] // self.examples), -(-self.shape[2] // self.rows)

    @property
    def statistics(self) -> tuple[int, int, int, int, int]:
        """The shape of an array of one number for each row.

        The numbers of a block lie side by side. As a column, each would take a row of a tile.
        """
        batch, examples, _, _ = self.shape
        return batch, examples, self.steps[1], 1, self.rows


def plan(
    shape: tuple[int, ...], dtype_size: int, *, batch: int, k: int, arrays: int, features: int
) -> Plan:
    """Divide x.

    Args:
      shape: of x.
      dtype_size: bytes of an element of x.
      batch: how many of the leading examples must not share a block.
      k: features of a row.
      arrays: how many arrays like x the kernel reads and writes.
      features: how many rows of float32 numbers it has beside them.
    """
    tile = SUBLANES * 4 // dtype_size
    n = math.prod(shape) // (batch * k)
    # A row of several axes is joined, which may be a copy.
    leading = (shape[:-1] if shape[-1] == k else ()) or (batch, n)
    order = _order(leading, batch)
    positions = leading[order[-1]]
    if positions % SUBLANES == 0 or n % positions:
        positions = n
    examples = n // positions
    a_row, fixed = _bytes(k, dtype_size, arrays, features)
    fit = max((DEFAULT_LIMIT - _SPARE - fixed) // a_row, tile)
    padded = _up(positions, tile)
    if examples > 1 and padded <= fit:
        rows = positions
        block = max(1, min(fit // padded, -(-examples // _STEPS)))
    else:
        block = 1
        most = min(fit, _MAX_ROWS, max(LANES, positions // _STEPS))
        rows = positions if positions <= min(most, LANES) else 2 ** int(math.log2(most))
    group = 2 ** int(math.log2(max(_GROUP // _up(k, LANES), 1)))
    group = min(max(group, tile), LANES, rows if rows < positions else LANES)
    large = fixed + block * _up(rows, tile) * a_row > DEFAULT_LIMIT - _SPARE
    return Plan(leading, order, (batch, examples, positions, k), block, rows, group, large)


def longest_row(dtype_size: int, arrays: int, features: int) -> int:
    """The most features of a row whose smallest block fits."""
    tile = SUBLANES * 4 // dtype_size
    fits = lambda k: sum(_bytes(k, dtype_size, arrays, features, tile)) <= LIMIT - _SPARE
    k = LANES
    while fits(2 * k):
        k *= 2
    return next(n for n in range(2 * k, 0, -LANES) if fits(n))


def _bytes(k: int, dtype_size: int, arrays: int, features: int, rows: int = 1) -> tuple[int, int]:
    """Of so many rows, and of what is as large for any number of rows."""
    wide = _up(k, LANES)
    return rows * (2 * arrays * wide * dtype_size + 4 * LANES), features * wide * 4


def _order(leading: tuple[int, ...], batch: int) -> tuple[int, ...]:
    """The axes with the one last that fills its tiles best; the nearest, if several do.

    Those of the batch stay first.
    """
    first = next(i for i in range(len(leading) + 1) if math.prod(leading[:i]) == batch)
    axes = list(range(len(leading)))
    padding = lambda axis: _up(leading[axis], SUBLANES) / leading[axis]
    best = min(reversed(axes[first:]), key=padding, default=axes[-1])
    return (*(axis for axis in axes if axis != best), best)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
