"""Programs for accelerators before XLA: results, reductions, residuals."""

import re

import jax
import jax.numpy as jnp
import pytest
from norms import NORMS, norm_id

SHAPE = (4, 16, 64)


def arguments(norm, dtype):
    x = jax.ShapeDtypeStruct(SHAPE, dtype)
    return x, *2 * [jax.ShapeDtypeStruct(norm.features(SHAPE), jnp.float32)]


def reductions(text):
    return len(re.findall(r"\breduce\(", text))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("norm", NORMS, ids=norm_id)
def test_forward_has_one_result_and_no_kernel(norm, platform):
    traced = jax.jit(norm.__call__).trace(*arguments(norm, jnp.bfloat16))
    program = traced.lower(lowering_platforms=(platform,)).as_text()
    head = next(line for line in program.splitlines() if "@main" in line)
    assert head.split("->")[1].count("tensor<") == 1
    assert "custom_call" not in program
    # A number near the mean, the mean's distance from it, and the variance; or the mean square.
    sums = 3 if norm.subtract_mean else 1
    # Of each example, and of all of them, where the last two are one; of a group of features.
    more = {"batch": 2, "group": 3}.get(norm.name, 0)
    assert len(re.findall(r"stablehlo\.reduce\b", program)) == sums + more


@pytest.mark.parametrize("norm", NORMS, ids=norm_id)
def test_backward_reduces_dy_and_dy_h_once_over_each_of_its_axes(norm):
    def pullback(x, scale, bias):
        return jax.vjp(lambda *args: norm(*args, implementation="xla"), x, scale, bias)[1]

    x, *params = arguments(norm, jnp.float32)
    kept = jax.eval_shape(pullback, x, *params)
    backward = jax.jit(lambda kept, dy: kept(dy)).lower(kept, x).compile().as_text()
    # sum(g) and sum(g h) for dx, sum(dy h) and sum(dy) for the parameters.
    sums = 4 if norm.subtract_mean else 3
    # Over positions they are the same two sums, but for a factor. Batch norm has no others; group
    # norm adds them over a group, and over the examples.
    assert reductions(backward) == sums + {"batch": -2, "group": 2}.get(norm.name, 0)
