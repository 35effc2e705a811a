"""Layer and rms norm of rows, forward and backward, for Mosaic GPU.

Rows are kept in registers, so memory is read and written once. tiles.py divides rows into tiles.

In the backward pass each of P programs computes every P-th tile of rows and sums its terms of the
gradients of scale and bias. XLA adds the sums of the programs.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxnorm.kernels.gpu.registers import Rows, store
from jaxnorm.kernels.gpu.tiles import VECTOR_BYTES, WARPS, tile

interpret: Any = None  # tests set it to run the kernels without a GPU


def forward(
    x: jax.Array,
    residual: jax.Array | None,
    scale: jax.Array | None,
    bias: jax.Array | None,
    *,
    epsilon: float,
    subtract_mean: bool,
) -> list[Any]:
    """Return y, the residual sum and the statistics of x of shape (rows, k)."""
    rows, k = x.shape
    t = tile(rows, k, VECTOR_BYTES // x.dtype.itemsize)
    assert t  # unsupported_reason has checked it
    t = Rows(*t)
    statistic = jax.ShapeDtypeStruct((rows,), jnp.float32)
    # About 1 / sqrt(k), so that sums of scaled squares don't overflow; a power of two is exact.
    small = 2.0 ** -math.ceil(math.log2(k) / 2)

    def body(refs, results, shared):
        start = lax.axis_index("tile") * t.rows
        d = t.load(refs["x"], start)
        if "residual" in refs:
            d = d + t.load(refs["residual"], start)
            t.store(results["residual_sum"], start, d)
        if subtract_mean:
            (high,) = t.means(shared, 0, d)
            d = d - t.broadcast(high)
            low, power = t.means(shared, 1, d, square(d))
            var = jnp.maximum(power / small**2 - low * low, 0.0)
            d = d - t.broadcast(low)
            t.store_statistic(results["high"], start, high)
            t.store_statistic(results["low"], start, low)
        else:
            (power,) = t.means(shared, 0, square(d))
            var = power / small**2
        rstd = _reciprocal_root(var + epsilon)
        t.store_statistic(results["var"], start, var)
        t.store_statistic(results["rstd"], start, rstd)
        y = d * t.broadcast(rstd)
        if "scale" in refs:
            y = y * t.load_param(refs["scale"])
        if "bias" in refs:
            y = y + t.load_param(refs["bias"])
        t.store(results["y"], start, y)

    def square(d):
        scaled = d * small
        return scaled * scaled

    like_x = jax.ShapeDtypeStruct(x.shape, x.dtype)
    mean = statistic if subtract_mean else None
    outputs = _call(
        t,
        body,
        {"x": x, "residual": residual, "scale": scale, "bias": bias},
        {
            "y": like_x,
            "residual_sum": None if residual is None else like_x,
            "high": mean,
            "low": mean,
            "var": statistic,
            "rstd": statistic,
        },
        {"tile": rows // t.rows},
    )
    return [outputs.get(name) for name in ("y", "residual_sum", "high", "low", "var", "rstd")]


def vjp(
    x: jax.Array,
    dy: jax.Array,
    d_residual_sum: jax.Array | None,
    scale: jax.Array | None,
    high: jax.Array | None,
    low: jax.Array | None,
    rstd: jax.Array,
    *,
    batch: int,
    wanted: tuple[bool, ...],
) -> list[Any]:
    """Return the gradients of x, of shape (rows, k), and of scale and bias of `batch` parts."""
    rows, k = x.shape
    part_rows = rows // batch
    t = tile(part_rows, k, 4)  # Mosaic does not sum vectors of more over warps
    assert t  # unsupported_reason has checked it
    t = Rows(*t)
    tiles = part_rows // t.rows
    programs = min(t.programs, tiles)

    def body(refs, results, shared):
        part, program = lax.axis_index("part"), lax.axis_index("program")
        param = t.load_param(refs["scale"]) if "scale" in refs else None

        def step(i, sums):
            start = part * part_rows + (program + i * programs) * t.rows
            x_hat, d = t.load(refs["x"], start), t.load(refs["dy"], start)
            if "high" in refs:
                x_hat = x_hat - t.broadcast(t.load_statistic(refs["high"], start))
                x_hat = x_hat - t.broadcast(t.load_statistic(refs["low"], start))
            r = t.broadcast(t.load_statistic(refs["rstd"], start))
            x_hat = x_hat * r
            g = d if param is None else d * param
            if "high" in refs:
                mean_dy_xhat, mean_dy = t.means(shared, i % 2, g * x_hat, g)
                dx = (g - t.broadcast(mean_dy) - x_hat * t.broadcast(mean_dy_xhat)) * r
            else:
                (mean_dy_xhat,) = t.means(shared, i % 2, g * x_hat)
                dx = (g - x_hat * t.broadcast(mean_dy_xhat)) * r
            if "d_residual_sum" in refs:
                dx = dx + t.load(refs["d_residual_sum"], start)
            t.store(results["dx"], start, dx)
            terms = {"dscale": d * x_hat, "dbias": d}
            return {name: a + terms[name] for name, a in sums.items()}

        names = [name for name in ("dscale", "dbias") if name in results]
        zeros = lambda: plgpu.layout_cast(jnp.zeros(t.shape, jnp.float32), t.layout)
        steps = (tiles - program + programs - 1) // programs
        sums = lax.fori_loop(0, steps, step, {name: zeros() for name in names})
        for name in names:
            partial_sum = results[name].at[part * programs + program]
            if t.segments > 1:
                store(partial_sum.at[pl.ds(t.segment(), WARPS), :], sums[name])
            else:
                store(partial_sum.at[0, :], jnp.sum(sums[name], axis=0))

    param_sums = jax.ShapeDtypeStruct((batch * programs, t.segments, k // t.segments), jnp.float32)
    outputs = _call(
        t,
        body,
        {
            "x": x,
            "dy": dy,
            "d_residual_sum": d_residual_sum,
            "scale": scale,
            "high": high,
            "low": low,
            "rstd": rstd,
        },
        {
            "dx": jax.ShapeDtypeStruct(x.shape, x.dtype),
            "dscale": param_sums if wanted[0] else None,
            "dbias": param_sums if wanted[1] else None,
        },
        {"part": batch, "program": programs},
    )
    sums = [outputs.get(name) for name in ("dscale", "dbias")]
    return [
        outputs["dx"],
        *(None if a is None else jnp.sum(a.reshape(batch, programs, k), 1) for a in sums),
    ]


def _call(
    t: Rows, body, operands: dict[str, Any], results: dict[str, Any], grid: dict[str, int]
) -> dict[str, jax.Array]:
    """Run `body(operands, results, shared)` in a grid, without arrays that are None.

    `body` gets arrays of rows as arrays of segments; parameters are rows.
    """
    segment = t.k // t.segments
    operands = {
        name: a.reshape(-1, segment) if a.ndim == 2 else a
        for name, a in operands.items()
        if a is not None
    }
    results = {name: a for name, a in results.items() if a is not None}
    segmented = [
        jax.ShapeDtypeStruct((a.shape[0] * t.segments, segment), a.dtype) if a.ndim == 2 else a
        for a in results.values()
    ]

    def jaxnorm_rows(*refs):
        inputs, rest = refs[: len(operands)], refs[len(operands) :]
        outputs, shared = rest[: len(results)], rest[len(results) :]
        named_inputs = dict(zip(operands, inputs, strict=True))
        body(named_inputs, dict(zip(results, outputs, strict=True)), shared)

    shared = [plgpu.SMEM((4 * t.segments,), jnp.float32), plgpu.Barrier(num_arrivals=t.warpgroups)]
    kernel = plgpu.kernel(
        jaxnorm_rows,
        out_type=segmented,
        scratch_types=shared if t.segments > 1 else (),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=t.warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
            # A sum over the rows of a warpgroup goes through shared memory.
            reduction_scratch_bytes=4 * max(512, t.k if t.segments == 1 else 0),
        ),
        interpret=interpret,
    )
    outputs = kernel(*operands.values())
    return {
        name: a.reshape(result.shape)
        for (name, result), a in zip(results.items(), outputs, strict=True)
    }


def _reciprocal_root(a: jax.Array) -> jax.Array:
    """Return a**-1/2, and zero for zero: the hardware's estimate and a step of Newton's method."""
    zero = a <= 0
    positive = jnp.where(zero, 1.0, a)
    estimate = lax.rsqrt(positive)
    error = 1 - (positive * estimate) * estimate
    # The error is NaN for infinity, whose estimate is right.
    refined = jnp.where(error == error, estimate + 0.5 * estimate * error, estimate)
    return jnp.where(zero, 0.0, refined)
