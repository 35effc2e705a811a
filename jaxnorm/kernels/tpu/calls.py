"""The two calls: which arrays a kernel gets, in which blocks, and what it says of its cost."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxnorm._internals import manual_axis_type
from jaxnorm.kernels.tpu import rows
from jaxnorm.kernels.tpu.blocks import LANES, LIMIT, SUBLANES, Plan

Arrays = dict[str, jax.Array]


def forward(
    plan: Plan, given: Arrays, *, epsilon: float, subtract_mean: bool, interpret: Any
) -> Arrays:
    """y, total and the statistics; `given` has x and, as there are, residual, scale, bias."""
    results = ["y", "total"] if "residual" in given else ["y"]
    results += ["high", "low", "var", "rstd"] if subtract_mean else ["var", "rstd"]
    body = functools.partial(rows.forward, plan, epsilon, subtract_mean)
    name = f"jaxnorm_{'layer' if subtract_mean else 'rms'}_forward"
    return _call(plan, 1, name, body, given, results, {}, interpret)


def backward(plan: Plan, given: Arrays, wanted: tuple[str, ...], *, interpret: Any) -> Arrays:
    """dx, and the sums "dscale" and "dbias" that are wanted, of shape (batch, parts, 1, k).

    `given` has x, dy, rstd and, as there are, dtotal, scale, high, low.
    """
    # Two sums, for TPUs whose two cores divide the work.
    parts = 2 if wanted and plan.shape[0] == 1 and math.prod(plan.steps) > 1 else 1
    sums = pltpu.VMEM((SUBLANES, plan.shape[-1]), jnp.float32)
    scratch = {f"{name} {kind}": sums for name in wanted for kind in rows.SUMS}
    body = functools.partial(rows.backward, plan, parts, wanted)
    name = f"jaxnorm_{'layer' if 'high' in given else 'rms'}_backward"
    return _call(plan, parts, name, body, given, ["dx", *wanted], scratch, interpret)


def _call(
    plan: Plan,
    parts: int,
    name: str,
    body: Callable,
    given: Arrays,
    results: list[str],
    scratch: dict[str, Any],
    interpret: Any,
) -> Arrays:
    """Call a kernel, whose body gets its references by their names."""
    batch, _, _, k = plan.shape
    blocks, (_, along) = math.prod(plan.steps), plan.steps
    steps = -(-blocks // parts)

    def place(part, step):
        block = jnp.minimum(part * steps + step, blocks - 1)  # with two parts one may be left over
        return lax.div(block, jnp.int32(along)), lax.rem(block, jnp.int32(along))

    x = given["x"]
    typed = functools.partial(jax.ShapeDtypeStruct, manual_axis_type=manual_axis_type(x))
    # The block of each kind of array, and the type of a result.
    of_rows = (
        pl.BlockSpec(
            (None, plan.examples, plan.rows, k), lambda b, part, step: (b, *place(part, step), 0)
        ),
        typed(plan.shape, x.dtype),
    )
    of_numbers = (
        pl.BlockSpec(
            (None, plan.examples, None, 1, plan.rows),
            lambda b, part, step: (b, *place(part, step), 0, 0),
        ),
        typed(plan.statistics, jnp.float32),
    )
    of_features = pl.BlockSpec((1, k), lambda b, part, step: (0, 0)), None
    of_sums = (
        pl.BlockSpec((None, None, 1, k), lambda b, part, step: (b, part, 0, 0)),
        typed((batch, parts, 1, k), jnp.float32),
    )
    kinds = {
        **dict.fromkeys(("x", "residual", "dy", "dtotal", "y", "total", "dx"), of_rows),
        **dict.fromkeys(rows.STATISTICS, of_numbers),
        **dict.fromkeys(("scale", "bias"), of_features),
        **dict.fromkeys(("dscale", "dbias"), of_sums),
    }
    out_shape = [kinds[result][1] for result in results]
    # Statistics with a row for each row of a block, one beside the other.
    columns = pltpu.VMEM((-(-plan.rows // LANES) * LANES, LANES), jnp.float32)
    order = "arbitrary" if scratch else "parallel"  # sums are carried from step to step
    scratch = {"columns": columns} | scratch
    names = [*given, *results, *scratch]
    sizes = [a.size * a.dtype.itemsize for a in (*given.values(), *out_shape)]
    found = pl.pallas_call(
        lambda *refs: body(dict(zip(names, refs, strict=True))),
        grid=(batch, parts, steps),
        in_specs=[kinds[each][0] for each in given],
        out_specs=[kinds[result][0] for result in results],
        out_shape=out_shape,
        scratch_shapes=list(scratch.values()),
        name=name,
        interpret=interpret,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", order),
            vmem_limit_bytes=LIMIT if plan.large else None,
        ),
        # Each array is moved once. XLA plans with this, and benchmarks/hlo.py counts it.
        cost_estimate=pl.CostEstimate(
            flops=12 * x.size, transcendentals=x.size // k, bytes_accessed=sum(sizes)
        ),
    )(*given.values())
    return dict(zip(results, found, strict=True))
