"""Every transformation that JAX offers, of every norm, against the plain formula in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from norms import NORMS, norm_id

pytestmark = pytest.mark.usefixtures("x64")

SHAPE = (8, 3, 4)


def scalar(y):
    """A loss that weighs every element differently, so that no gradient vanishes by symmetry."""
    return jnp.sum(jnp.sin(y) * jnp.linspace(-1, 2, y.size, dtype=y.dtype).reshape(y.shape))


def value(f, args):
    return f(*args)


def jvp(f, args):
    return jax.jvp(f, args, jax.tree.map(jnp.cos, args))


def linearize(f, args):
    return jax.linearize(f, *args)[1](*jax.tree.map(jnp.cos, args))


def vjp(f, args):
    return jax.vjp(f, *args)[1](jnp.cos(args[0]))


def grad(f, args):
    return jax.grad(lambda *args: scalar(f(*args)), (0, 1, 2))(*args)


def jacobians(f, args):
    return jax.jacfwd(f, (0, 1, 2))(*args), jax.jacrev(f, (0, 1, 2))(*args)


def forward_over_reverse(f, args):
    return jvp(lambda *args: grad(f, args), args)


def reverse_over_forward(f, args):
    return jax.grad(lambda *args: scalar(jvp(f, args)[1]), (0, 1, 2))(*args)


def reverse_over_reverse(f, args):
    def squares(*args):
        return sum(jnp.sum(g**2) for g in grad(f, args))

    return jax.grad(squares, (0, 1, 2))(*args)


def hessian(f, args):
    x, scale, bias = args
    return jax.hessian(lambda x: scalar(f(x, scale, bias)))(x)


def third_order(f, args):
    x, scale, bias = args

    def along(t):
        return scalar(f(x + t * jnp.cos(x), scale, bias))

    return jax.grad(jax.grad(jax.grad(along)))(0.0)


def vmap_of_grad(f, args):
    batched = jax.tree.map(lambda a: jnp.stack([a, 2 * a + 1, -a]), args)
    return jax.vmap(lambda *args: grad(f, args))(*batched)


def grad_of_vmap(f, args):
    x, scale, bias = args
    batched = jax.vmap(f, (0, None, None))
    return grad(lambda x, *p: batched(x, *p), (jnp.stack([x, 2 * x, -x], 0), scale, bias))


def scan(f, args):
    x, scale, bias = args

    def body(x, _):
        return (f(x, scale, bias) + x, None)

    return jax.grad(lambda x: scalar(lax.scan(body, x, length=3)[0]))(x)


def cond(f, args):
    def branch(*args):
        return lax.cond(args[0][0, 0, 0] > 9, lambda *a: a[0], f, *args)

    return grad(branch, args)


def while_loop(f, args):
    x, scale, bias = args

    def loop(x):
        def step(carry):
            return (carry[0] + 1, f(carry[1], scale, bias))

        return lax.while_loop(lambda carry: carry[0] < 3, step, (0, x))[1]

    return jax.jvp(loop, (x,), (jnp.cos(x),))


def checkpoint(f, args):
    return grad(jax.checkpoint(f), args), reverse_over_reverse(jax.checkpoint(f), args)


def exported(f, args):
    backward = jax.jit(lambda *args: grad(f, args))
    return export.deserialize(export.export(backward)(*args).serialize()).call(*args)


def exported_vjp(f, args):
    call = export.deserialize(export.export(jax.jit(f))(*args).serialize(vjp_order=1)).call
    return grad(call, args)


TRANSFORMATIONS = [
    value,
    jvp,
    linearize,
    vjp,
    grad,
    jacobians,
    forward_over_reverse,
    reverse_over_forward,
    reverse_over_reverse,
    hessian,
    third_order,
    vmap_of_grad,
    grad_of_vmap,
    scan,
    cond,
    while_loop,
    checkpoint,
    exported,
    exported_vjp,
]


def arguments(norm, rng):
    x = jnp.asarray(rng.standard_normal(SHAPE) + 1)
    scale, bias = (jnp.asarray(rng.standard_normal(norm.features(SHAPE))) for _ in range(2))
    return x, scale, bias


def assert_agrees(norm, transformation, rng, where):
    args = arguments(norm, rng)

    def run(f):
        # Epsilon is large enough for groups of one element to have derivatives near one.
        f = functools.partial(f, where=where, epsilon=0.01)
        if transformation in (exported, exported_vjp):
            return transformation(f, args)
        return jax.jit(lambda *args: transformation(f, args))(*args)  # one program for all of it

    assert_same(run(norm), run(norm.plain))


def assert_same(ours, plain):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        # Rounding of some hundred float64 operations, relative to the largest element.
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * max(1, np.abs(b).max()))


@pytest.mark.parametrize("transformation", TRANSFORMATIONS, ids=lambda t: t.__name__)
@pytest.mark.parametrize("norm", NORMS, ids=norm_id)
def test_agrees_with_the_plain_formula_where_some_count(norm, transformation, rng):
    where = jnp.asarray(rng.random(SHAPE) < 0.6).at[:, 0].set(True).at[..., 0].set(True)
    assert_agrees(norm, transformation, rng, where)


@pytest.mark.parametrize("transformation", [grad, forward_over_reverse], ids=lambda t: t.__name__)
@pytest.mark.parametrize("norm", NORMS, ids=norm_id)
def test_agrees_with_the_plain_formula(norm, transformation, rng):
    assert_agrees(norm, transformation, rng, None)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("norm", [norm for norm in NORMS if norm.name != "batch"], ids=norm_id)
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
@pytest.mark.parametrize("norm", NORMS, ids=norm_id)
def test_jit_over_a_sharded_batch(norm, axis_type, rng):
    args = arguments(norm, rng)
    expected = vjp(norm.plain, args), jvp(norm.plain, args)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        x = jax.device_put(args[0], NamedSharding(mesh, PartitionSpec("data")))
        sharded = jax.jit(lambda *args: (vjp(norm, args), jvp(norm, args)))(x, *args[1:])
    assert_same(sharded, expected)


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
