"""Derivatives of norms of a residual sum, and their residuals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adding import ADD_NORM_IDS, ADD_NORMS, draw
from contract import EPS
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from transformations import (
    SHAPE,
    arguments,
    assert_same,
    checkpoint,
    exported_vjp,
    forward_over_reverse,
    grad_of_vmap,
    jacobians,
    jvp,
    reverse_over_reverse,
    scan,
    vjp,
    vmap_of_grad,
)

EACH = pytest.mark.parametrize("add", ADD_NORMS, ids=ADD_NORM_IDS)
LAYER, _, RMS = ADD_NORMS


def run_in_float64(f, transformation, rng, **options):
    args = arguments(LAYER.norm, rng)
    f = functools.partial(f, epsilon=0.01, **options)
    if transformation is exported_vjp:
        return transformation(f, args)
    return jax.jit(lambda *args: transformation(f, args))(*args)


@pytest.mark.usefixtures("x64", "unoptimized")
@pytest.mark.parametrize(
    ("transformation", "masked"),
    [
        (jacobians, True),
        (forward_over_reverse, False),
        (reverse_over_reverse, True),
        (vmap_of_grad, True),
        (scan, False),
        (checkpoint, False),
        (exported_vjp, True),
    ],
    ids=lambda v: getattr(v, "__name__", f"masked-{v}"),
)
def test_every_transformation_agrees_with_the_plain_formula(transformation, masked, rng):
    where = jnp.asarray(rng.random(SHAPE) < 0.6).at[..., 0].set(True) if masked else None
    ours, plain = (
        run_in_float64(f, transformation, np.random.default_rng(0), where=where)
        for f in (LAYER.of_x, LAYER.plain_of_x)
    )
    assert_same(ours, plain)


@pytest.mark.usefixtures("x64", "kernel")
@pytest.mark.parametrize(
    ("add", "transformation"),
    [
        (LAYER, forward_over_reverse),
        (LAYER, reverse_over_reverse),
        (LAYER, vmap_of_grad),
        (RMS, grad_of_vmap),
        (RMS, scan),
        (RMS, checkpoint),
    ],
    ids=lambda v: getattr(v, "__name__", None),
)
def test_the_primitives_agree_with_the_plain_formula(add, transformation, rng):
    """Of float32: a program that a kernel may compute."""
    args = tuple(a.astype(jnp.float32) for a in arguments(add.norm, rng))
    ours = jax.jit(lambda *args: transformation(functools.partial(add.of_x, epsilon=0.01), args))
    plain = lambda *a: transformation(functools.partial(add.plain_of_x, epsilon=0.01), a)
    truth = jax.jit(plain)(*(a.astype(jnp.float64) for a in args))
    for a, b in zip(jax.tree.leaves(ours(*args)), jax.tree.leaves(truth), strict=True):
        assert a.dtype == jnp.float32
        # Rounding of some hundred float32 operations, relative to the largest element.
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1, np.abs(b).max()))


@pytest.mark.usefixtures("x64", "unoptimized")
@pytest.mark.parametrize(
    ("how", "dtype"),
    [
        ("shard_map", jnp.float32),
        ("shard_map", jnp.float64),
        ("Auto", jnp.float64),
        ("Explicit", jnp.float32),
    ],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_over_eight_devices(how, dtype, rng):
    args = tuple(a.astype(dtype) for a in arguments(LAYER.norm, rng))
    truth = jax.jit(lambda *args: [t(LAYER.plain_of_x, args) for t in (vjp, jvp)])(*args)
    axis_type = AxisType.Explicit if how == "Explicit" else AxisType.Auto
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    data, all_ = PartitionSpec("data"), PartitionSpec()
    f = LAYER.of_x
    if how == "shard_map":
        f = jax.shard_map(f, mesh=mesh, in_specs=(data, all_, all_), out_specs=data)
    with jax.set_mesh(mesh):
        x = args[0] if how == "shard_map" else jax.device_put(args[0], NamedSharding(mesh, data))
        ours = jax.jit(lambda *args: [t(f, args) for t in (vjp, jvp)])(x, *args[1:])
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(truth), strict=True):
        units = 1e-12 if dtype == jnp.float64 else 1e-5
        np.testing.assert_allclose(a, b, rtol=0, atol=units * max(1, np.abs(b).max()))


@pytest.mark.usefixtures("x64", "unoptimized")
def test_scan_over_layers(rng):
    """The stream is the carry; each layer changes it, and has its own scale."""
    scales, x = jnp.asarray(rng.standard_normal((3, 8))), jnp.asarray(rng.standard_normal((4, 8)))

    def loss(add, scales, x):
        def layer(carry, scale):
            change, stream = carry
            y, stream = add(change, stream, scale)
            return (jnp.tanh(y), stream), None

        change, stream = lax.scan(layer, (x, jnp.sin(x)), scales)[0]
        return jnp.sum((change + stream) ** 2)

    def plain(x, residual, scale):
        return RMS.norm.plain(x + residual, scale), x + residual

    ours, truth = (
        jax.jit(jax.value_and_grad(functools.partial(loss, f), (0, 1)))(scales, x)
        for f in (RMS, plain)
    )
    assert_same(ours, truth)


@pytest.mark.parametrize("implementation", ["xla", None])
@EACH
def test_backward_keeps_the_total_and_nothing_else_of_its_size(add, implementation):
    x = jnp.ones((8, 16, 32), jnp.bfloat16)
    scale, bias = (jnp.ones(add.norm.features(x.shape), jnp.float32) for _ in range(2))
    f = functools.partial(add, implementation=implementation)
    (_, total), backward = jax.vjp(f, x, 2 * x, scale, bias)
    kept = [leaf for leaf in jax.tree.leaves(backward) if leaf.size >= x.size]
    assert [leaf.dtype for leaf in kept] == [x.dtype]
    np.testing.assert_array_equal(kept[0], total)


def test_a_gradient_of_one_result_alone():
    example, residual, d_residual_sum = draw(LAYER)
    _, pullback = jax.vjp(LAYER, example.x, residual)
    zero = jnp.zeros_like(example.x)
    both = pullback((example.dy, d_residual_sum))
    y = jax.vjp(lambda *args: LAYER(*args)[0], example.x, residual)[1](example.dy)
    total = jax.vjp(lambda *args: LAYER(*args)[1], example.x, residual)[1](d_residual_sum)
    np.testing.assert_array_equal(y[0], pullback((example.dy, zero))[0])
    np.testing.assert_array_equal(total[1], d_residual_sum)
    np.testing.assert_allclose(y[0] + total[0], both[0], rtol=0, atol=4 * EPS)
