"""The two kernels, of a block of rows.

A block is on the chip, so it is passed over as often as accuracy takes. Rows are computed in groups
that fit into the registers, and long rows in parts.

Statistics lie side by side in memory but are needed as columns, one number for each row. So a group
writes its numbers into the columns of a scratch array, and that is transposed at the end; backward
it is the other way round.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxnorm.kernels.tpu.blocks import LANES, SUBLANES, Plan

PART = 8 * LANES  # features that are computed at once
STATISTICS = ("high", "low", "var", "rstd")
# Of the gradients of scale and bias: the sum of this block, of the blocks before, and what rounding
# took from that.
SUMS = ("of block", "before", "lost")

Refs = dict[str, Any]


def forward(plan: Plan, epsilon: float, subtract_mean: bool, refs: Refs) -> None:
    """y, total and the statistics of a block."""
    k = plan.shape[-1]
    # About 1 / sqrt(k), so that sums of scaled squares don't overflow; a power of two.
    root = 2.0 ** -math.ceil(math.log2(k) / 2)
    statistics = [name for name in STATISTICS if name in refs]
    block, _ = _block(plan, 1)

    def group(example, start, size):
        def part(at):
            x = refs["x"][example, pl.ds(start, size), at].astype(jnp.float32)
            if "residual" in refs:
                x += refs["residual"][example, pl.ds(start, size), at].astype(jnp.float32)
            return x

        def average(f):
            return _sum(f(part(at)) for at in _parts(k)) / k

        less_mean: Callable = lambda x: x
        found = {}
        if subtract_mean:
            high = _drop_last_bit(average(lambda x: x))
            low = average(lambda x: x - high)
            less_mean = lambda x: (x - high) - low
            found = {"high": high, "low": low}
        var = average(lambda x: (less_mean(x) * root) ** 2) / root**2
        rstd = _reciprocal_std(var, epsilon)
        found |= {"var": var, "rstd": rstd}
        for at in _parts(k):
            x = part(at)
            y = less_mean(x) * rstd
            if "scale" in refs:
                y *= refs["scale"][:, at]
            if "bias" in refs:
                y += refs["bias"][:, at]
            for name, value in (("y", y), ("total", x)):
                if name in refs:
                    ref = refs[name]
                    ref[example, pl.ds(start, size), at] = value.astype(ref.dtype)
        lane = lax.broadcasted_iota(jnp.int32, (size, LANES), 1)
        columns = jnp.broadcast_to(found[statistics[-1]], lane.shape)
        for i, name in enumerate(statistics[:-1]):
            columns = jnp.where(lane == i, found[name], columns)
        refs["columns"][pl.ds(start, size), :] = columns

    def all_of(example):
        _for_each_group(plan, block, functools.partial(group, example))
        for start, size in _chunks(plan.rows, LANES):
            lines = refs["columns"][start : start + LANES, :].T
            for i, name in enumerate(statistics):
                refs[name][example, :, start : start + size] = lines[i : i + 1, :size]

    _for_each_example(plan, block, all_of)


def backward(plan: Plan, parts: int, wanted: tuple[str, ...], refs: Refs) -> None:
    """dx of a block, and the sums of all blocks of this part."""
    k, blocks = plan.shape[-1], math.prod(plan.steps)
    block, number = _block(plan, parts)
    step, last = pl.program_id(2), pl.num_programs(2) - 1
    statistics = [name for name in STATISTICS if name in refs]

    def group(example, start, size):
        at_rows = pl.ds(start, size)
        columns = refs["columns"][at_rows, :]
        numbers = {name: columns[:, i : i + 1] for i, name in enumerate(statistics)}
        rstd = numbers["rstd"]

        def terms(at):
            x, dy = (refs[name][example, at_rows, at].astype(jnp.float32) for name in ("x", "dy"))
            for name in ("high", "low"):
                x = x - numbers[name] if name in numbers else x
            return x * rstd, dy, dy * refs["scale"][:, at] if "scale" in refs else dy

        def average(f):
            return _sum(f(*terms(at)) for at in _parts(k)) / k

        mean_gh = average(lambda h, dy, g: g * h)
        mean_g = average(lambda h, dy, g: g) if "high" in refs else None
        there = _rows_there(plan, block, start, size)
        for at in _parts(k):
            h, dy, g = terms(at)
            dx = g - h * mean_gh if mean_g is None else (g - mean_g) - h * mean_gh
            dx *= rstd
            if "dtotal" in refs:
                dx += refs["dtotal"][example, at_rows, at].astype(jnp.float32)
            refs["dx"][example, at_rows, at] = dx.astype(refs["dx"].dtype)
            for name in wanted:
                term = dy * h if name == "dscale" else dy
                term = _sum_rows(term if there is None else jnp.where(there, term, 0))
                refs[f"{name} of block"][: term.shape[0], at] += term

    def all_of(example):
        for start, size in _chunks(plan.rows, LANES):
            lines = [refs[name][example, :, start : start + size] for name in statistics]
            lines += [jnp.zeros((SUBLANES - len(lines), size), jnp.float32)]
            columns = jnp.concatenate(lines, 0).T
            refs["columns"][start : start + size, :SUBLANES] = columns
        _for_each_group(plan, block, functools.partial(group, example))

    def all_blocks():
        for name in wanted:
            refs[f"{name} of block"][...] = jnp.zeros((SUBLANES, k), jnp.float32)
        _for_each_example(plan, block, all_of)
        for name in wanted:
            _add_exactly(*(refs[f"{name} {kind}"] for kind in SUMS))

    @pl.when(step == 0)
    def _():
        for name in wanted:
            for kind in SUMS[1:]:
                refs[f"{name} {kind}"][...] = jnp.zeros((SUBLANES, k), jnp.float32)

    if blocks % parts:
        pl.when(number < blocks)(all_blocks)
    else:
        all_blocks()

    @pl.when(step == last)
    def _():
        for name in wanted:
            before, lost = (refs[f"{name} {kind}"][...] for kind in SUMS[1:])
            # What is lost of infinity is NaN.
            total = jnp.where(jnp.abs(before) < jnp.inf, before + lost, before)
            refs[name][...] = jnp.sum(total, 0, keepdims=True)


def _block(plan: Plan, parts: int) -> tuple[tuple[Any, Any], Any]:
    """Which block this is, along the examples and the positions; and its number.

    With two parts, the second may be one block shorter: its last number is one too many.
    """
    blocks, along = math.prod(plan.steps), jnp.int32(plan.steps[1])
    number = pl.program_id(2)
    if parts > 1:
        number += pl.program_id(1) * pl.num_programs(2)
    block = jnp.minimum(number, blocks - 1)
    return (lax.div(block, along), lax.rem(block, along)), number


def _for_each_example(plan: Plan, block: tuple[Any, Any], run: Callable) -> None:
    """Run for each example of a block that is there; the last block may have fewer."""
    examples = plan.shape[1]
    there = plan.examples
    if examples % plan.examples:
        there = jnp.minimum(there, examples - block[0] * plan.examples)
    lax.fori_loop(0, there, lambda i, _: run(i), None)


def _for_each_group(plan: Plan, block: tuple[Any, Any], run: Callable) -> None:
    """Run with the first row and the number of rows of each group."""
    whole, left = divmod(plan.rows, plan.group)
    if plan.shape[2] % plan.rows:  # the last block has fewer
        there = jnp.minimum(plan.rows, plan.shape[2] - block[1] * plan.rows)
        whole = pl.cdiv(there, plan.group)
    at = lambda i: pl.multiple_of(i * plan.group, plan.group)
    if plan.rows >= plan.group:
        lax.fori_loop(0, whole, lambda i, _: run(at(i), plan.group), None)
    if left:
        run(plan.rows - left, left)


def _rows_there(plan: Plan, block: tuple[Any, Any], start: Any, size: int) -> jax.Array | None:
    """Which rows of a group are there, or None if all are."""
    if plan.shape[2] % plan.group == 0 or plan.steps[1] == 1:
        return None
    row = block[1] * plan.rows + start + lax.broadcasted_iota(jnp.int32, (size, 1), 0)
    return row < plan.shape[2]


def _chunks(size: int, most: int) -> Iterable[tuple[int, int]]:
    return [(start, min(most, size - start)) for start in range(0, size, most)]


def _parts(k: int) -> Iterable[slice]:
    return [slice(start, start + size) for start, size in _chunks(k, PART)]


def _sum(parts: Iterable[jax.Array]) -> jax.Array:
    """The sum of each row; features are added a tile at a time, pairs first."""
    total = rest = None
    for part in parts:
        if total is None:
            total = part
        elif part.shape == total.shape:
            total = total + part
        else:
            rest = part
    assert total is not None
    return _sum_of_part(total) if rest is None else _sum_of_part(total) + _sum_of_part(rest)


def _sum_of_part(part: jax.Array) -> jax.Array:
    width = part.shape[1]
    tiles = [part[:, start : start + size] for start, size in _chunks(width, LANES)]
    if len(tiles) > 1 and width % LANES:
        return _sum_of_part(part[:, : -(width % LANES)]) + _sum_of_part(tiles[-1])
    while len(tiles) > 1:
        odd = tiles[len(tiles) & ~1 :]
        tiles = [a + b for a, b in zip(tiles[::2], tiles[1::2], strict=False)] + odd
    return jnp.sum(tiles[0], 1, keepdims=True)


def _sum_rows(a: jax.Array) -> jax.Array:
    """Rows added up to a tile, where they fill some, or to one row."""
    size, width = a.shape
    if size % SUBLANES:
        return jnp.sum(a, 0, keepdims=True)
    return jnp.sum(a.reshape(size // SUBLANES, SUBLANES, width), 0)


def _add_exactly(term: Any, total: Any, lost: Any) -> None:
    """Add to the total, and what rounding takes to what is lost (Knuth's two-sum)."""
    a, b = total[...], term[...]
    both = a + b
    of_b = both - a
    lost[...] += (a - (both - of_b)) + (b - of_b)
    total[...] = both


def _drop_last_bit(a: jax.Array) -> jax.Array:
    """`a` with one bit less, so that it is no product that may be subtracted unrounded."""
    bits = pltpu.bitcast(a, jnp.int32)
    return pltpu.bitcast(bits & jnp.int32(-2), jnp.float32)


def _reciprocal_std(var: jax.Array, epsilon: float) -> jax.Array:
    """(var + epsilon)**-1/2, zero where it would be infinite; a TPU's rsqrt is less exact."""
    power = var + epsilon
    near = lax.rsqrt(jnp.where(power <= 0, 1, power))
    better = near + near * (0.5 - 0.5 * (power * near) * near)
    result = jnp.where(power < jnp.inf, better, near)  # inf * 0 is NaN
    return jnp.where(power <= 0, 0, result)
