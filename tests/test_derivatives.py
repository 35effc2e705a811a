"""Every transformation that JAX offers, of every norm, against the plain formula in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from norms import NORMS, norm_id
from transformations import (
    SHAPE,
    TRANSFORMATIONS,
    arguments,
    assert_same,
    exported,
    exported_vjp,
    forward_over_reverse,
    grad,
    jvp,
    reverse_over_reverse,
    vjp,
)

import jaxnorm as jn

pytestmark = pytest.mark.usefixtures("x64", "unoptimized")


def mask(rng):
    """Some of all elements, and at least one of each group of them."""
    return jnp.asarray(rng.random(SHAPE) < 0.6).at[:, 0].set(True).at[..., 0].set(True)


def assert_agrees(norm, transformation, rng, where):
    args = arguments(norm, rng)

    def run(f):
        # Epsilon is large enough for groups of one element to have derivatives near one.
        f = functools.partial(f, where=where, epsilon=0.01)
        if transformation in (exported, exported_vjp):
            return transformation(f, args)
        return jax.jit(lambda *args: transformation(f, args))(*args)  # one program for all of it

    assert_same(run(norm), run(norm.plain))


# All transformations of one norm of columns and of one norm of rows; the others are the same code
# with other axes.
@pytest.mark.thorough
@pytest.mark.parametrize("transformation", TRANSFORMATIONS, ids=lambda t: t.__name__)
@pytest.mark.parametrize("norm", NORMS[:2], ids=norm_id)
def test_agrees_with_the_plain_formula_where_some_count(norm, transformation, rng):
    assert_agrees(norm, transformation, rng, mask(rng))


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "unmasked"])
@pytest.mark.parametrize("transformation", [grad, forward_over_reverse], ids=lambda t: t.__name__)
@pytest.mark.parametrize("norm", NORMS, ids=norm_id)
def test_agrees_with_the_plain_formula(norm, transformation, masked, rng):
    assert_agrees(norm, transformation, rng, mask(rng) if masked else None)


# One norm of rows and one of columns; test_kernel_devices.py has all of them in float32.
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("norm", [NORMS[1], NORMS[4]], ids=norm_id)
def test_shard_map_over_the_batch(norm, check_vma, rng):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    data, all_ = PartitionSpec("data"), PartitionSpec()
    sharded = jax.shard_map(
        norm, mesh=mesh, in_specs=(data, all_, all_), out_specs=data, check_vma=check_vma
    )
    args = arguments(norm, rng)

    @functools.partial(jax.jit, static_argnums=0)
    def run(f, *args):
        return grad(f, args), forward_over_reverse(f, args), reverse_over_reverse(f, args)

    assert_same(run(sharded, *args), run(norm.plain, *args))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("norm", NORMS[:2], ids=norm_id)
def test_jit_over_a_sharded_batch(norm, axis_type, rng):
    args = arguments(norm, rng)
    expected = vjp(norm.plain, args), jvp(norm.plain, args)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        x = jax.device_put(args[0], NamedSharding(mesh, PartitionSpec("data")))
        sharded = jax.jit(lambda *args: (vjp(norm, args), jvp(norm, args)))(x, *args[1:])
    assert_same(sharded, expected)


@pytest.mark.thorough
@pytest.mark.parametrize("norm", NORMS, ids=norm_id)
def test_complex_input(norm, rng):
    x = jnp.asarray(rng.standard_normal(SHAPE) + 1j * rng.standard_normal(SHAPE) + 2j)
    params = [jnp.asarray(rng.standard_normal(norm.features(SHAPE)) + 1j) for _ in range(2)]
    args = (x, *params)

    @functools.partial(jax.jit, static_argnums=0)
    def run(f, args):
        gradient = jax.grad(lambda *args: jnp.sum(jnp.sin(jnp.abs(f(*args)))), (0, 1, 2))(*args)
        return gradient, jax.jvp(f, args, jax.tree.map(jnp.conj, args))

    assert_same(run(norm.__call__, args), run(norm.plain, args))


@pytest.mark.parametrize("norm", NORMS, ids=norm_id)
def test_backward_keeps_the_input_in_its_own_dtype_and_nothing_else_of_its_size(norm):
    x = jnp.ones((8, 16, 32), jnp.bfloat16)
    scale, bias = (jnp.ones(norm.features(x.shape), jnp.float32) for _ in range(2))
    _, backward = jax.vjp(norm, x, scale, bias)
    kept = [leaf for leaf in jax.tree.leaves(backward) if leaf.size >= x.size]
    assert [(leaf.shape, leaf.dtype) for leaf in kept] == [(x.shape, x.dtype)]


@pytest.mark.parametrize(
    "norm", [norm for norm in NORMS if norm.options.get("axis") != (-2, -1)], ids=norm_id
)
def test_export_with_symbolic_shapes(norm, rng):
    batch, height = export.symbolic_shape("batch, height")
    x = jax.ShapeDtypeStruct((batch, height, 4), jnp.float64)
    gradient = jax.jit(lambda x, *params: vjp(norm, (x, *params)))
    args = arguments(norm, rng)
    exported = export.export(gradient)(x, *args[1:])
    assert_same(exported.call(*args), vjp(norm.plain, args))


def test_export_with_a_symbolic_batch_of_small_images(rng):
    """How many elements share statistics is then not known to be more than any number."""
    x = rng.standard_normal((5, 4, 4, 8), np.float32)
    norm = jax.jit(lambda x: jn.batch_norm(x, jn.init_batch_norm_state(8))[0])
    shape = jax.ShapeDtypeStruct(export.symbolic_shape("batch, 4, 4, 8"), np.float32)
    np.testing.assert_allclose(export.export(norm)(shape).call(x), norm(x), atol=1e-6)
