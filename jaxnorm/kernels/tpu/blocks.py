"""How rows are divided into blocks that fit into VMEM, the memory on a TPU's chip.

x is seen as (batch, examples, positions, k). On a TPU the last two axes of an array are stored in
tiles, so joining axes is a copy unless the positions fill their tiles. Where they don't, a block is
several examples with all of their positions; else it is some rows of one long example.
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
      shape: of x as (batch, examples, positions, k).
      examples: how many a block has.
      rows: how many positions of each of them.
      group: how many rows are computed at once.
      large: whether the kernel has to ask for more VMEM than it gets unasked.
    """

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
    view = _view(shape, SUBLANES * 4 // dtype_size, batch, k)
    tile = SUBLANES * 4 // dtype_size
    _, examples, positions, _ = view
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
    return Plan(view, block, rows, group, large)


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


def _view(shape: tuple[int, ...], tile: int, batch: int, k: int) -> tuple[int, int, int, int]:
    """x as (batch, examples, positions, k), without a copy where that is possible."""
    n = math.prod(shape) // (batch * k)
    positions = shape[-2] if len(shape) > 1 and shape[-1] == k else 1
    if positions == 1 or positions % tile == 0 or n % positions:
        return batch, 1, n, k
    return batch, n // positions, positions, k


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
