"""Sums in two steps: the same numbers in fewer kernels."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding
from norms import NORMS, norm_id

import jaxnorm as jn
from jaxnorm.core.sums import repeat, sums

# Few sums of many elements: each is taken of four pieces first.
SHAPE = (2, 16, 64, 4)
POSITIONS = (1, 2)


@pytest.fixture(params=["cpu", "cuda"])
def platform(request, change):
    """The CPU runs what it has no reason to, too."""
    if request.param == "cuda":
        chosen = lambda *args, default, cuda=None, **_: (cuda or default)(*args)
        change(jax.lax, "platform_dependent", chosen)
    return request.param


def steps(f, *args, platform="cuda"):
    """The shapes of the sums in a program that was not optimized, less axes of size one."""
    text = jax.jit(f).trace(*args).lower(lowering_platforms=(platform,)).as_text()
    found = re.findall(r"stablehlo\.reduce\(.*?\) -> tensor<([\dx]+)xf32>", text, re.DOTALL)
    return [tuple(int(n) for n in shape.split("x") if n != "1") for shape in found]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.complex64, jnp.int32])
@pytest.mark.parametrize("axes", [POSITIONS, (0, 1, 2), (0,), (3,), (2, 3), (0, 1, 2, 3), ()])
@pytest.mark.parametrize("masked", [False, True])
def test_numbers(axes, dtype, masked, platform, rng):
    a = jnp.asarray(rng.integers(-9, 9, SHAPE), dtype)
    where = jnp.asarray(rng.random((2, 16, 1, 1)) < 0.5) if masked else None
    exact = np.sum(np.asarray(a), axes, keepdims=True, where=True if where is None else where)
    found = sums((a, 2 * jnp.real(a)), axes, where)
    chex.assert_trees_all_equal(found[0], jnp.asarray(exact))
    chex.assert_trees_all_equal(found[1], jnp.asarray(2 * exact.real))


def test_on_gpus_few_sums_are_taken_of_pieces_first_and_many_at_once():
    few = jax.ShapeDtypeStruct(SHAPE, jnp.float32)
    assert steps(lambda a: sums((a,), POSITIONS), few) == [(2, 4, 4), (2, 4)]
    for other in ("cpu", "tpu"):
        assert steps(lambda a: sums((a,), POSITIONS), few, platform=other) == [(2, 4)]
    many = jax.ShapeDtypeStruct((64, 16, 16, 256), jnp.float32)
    assert steps(lambda a: sums((a,), POSITIONS), many) == [(64, 256)]
    # 67 rows are no multiple of anything, and one row is too short.
    prime = jax.ShapeDtypeStruct((2, 67, 8, 4), jnp.float32)
    assert steps(lambda a: sums((a,), POSITIONS), prime) == [(2, 4)]


def test_the_second_step_is_one_sum_of_all_arrays():
    a = jax.ShapeDtypeStruct((4, 5, 6), jnp.float32)
    assert steps(lambda a: sums((a, a * a), (0, 1)), a) == [(4, 6), (4, 6), (2, 6)]


def test_repeat_is_the_transpose_of_a_sum(platform, rng):
    a = jnp.asarray(rng.normal(size=(2, 1, 1, 4)), jnp.float32)
    x = jnp.asarray(rng.normal(size=SHAPE), jnp.float32)
    chex.assert_trees_all_equal(repeat(a, x, POSITIONS), jnp.broadcast_to(a, SHAPE))
    (cotangent,) = jax.linear_transpose(lambda a: repeat(a, x, POSITIONS), a)(x)
    chex.assert_trees_all_equal(cotangent, sums((x,), POSITIONS)[0])


@pytest.mark.parametrize("spec", [(None, "data"), (None, None, "data"), ("data",)], ids=str)
@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_where_an_axis_is_sharded_nothing_is_gathered(mode, spec, platform):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(mode,))
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones(SHAPE), NamedSharding(mesh, jax.P(*spec)))

        @jax.jit
        def both(x):
            y, back = jax.vjp(lambda x: jn.instance_norm(2 * x, implementation="xla"), x)
            return y, *back(x)

        text = both.lower(x).compile().as_text() or ""
        chex.assert_trees_all_equal(both(x), (jnp.zeros(SHAPE), jnp.zeros(SHAPE)))
    assert "all-gather" not in text


@pytest.mark.parametrize(
    "platform", ["cpu", pytest.param("cuda", marks=pytest.mark.thorough)], indirect=True
)
def test_every_transformation(platform, rng):
    x = jnp.asarray(rng.normal(size=SHAPE), jnp.float32)
    norm = lambda x: jn.instance_norm(x, implementation="xla")
    plain = lambda x: (
        (x - x.mean(POSITIONS, keepdims=True)) / jnp.sqrt(x.var(POSITIONS, keepdims=True) + 1e-6)
    )
    loss = lambda f: lambda x: jnp.sum(jnp.sin(f(x)))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    spec = jax.P("data")
    over_devices = lambda f: jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec)
    results = [
        [
            jax.grad(loss(f))(x),
            jax.jvp(jax.grad(loss(f)), (x,), (jnp.cos(x),))[1],
            jax.grad(lambda x, f=f: jnp.vdot(jax.grad(loss(f))(x), jnp.cos(x)))(x),
            jax.vmap(jax.grad(loss(f)))(jnp.stack([x, 2 * x])),
            jax.grad(loss(over_devices(f)))(x),
            jax.grad(loss(jax.checkpoint(f)))(x),
            export.export(jax.jit(jax.grad(loss(f))), platforms=("cpu", "cuda"))(x).call(x),
        ]
        for f in (norm, plain)
    ]
    # Both are float32, and second derivatives add up what the first have rounded.
    for ours, expected in zip(*results, strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max())


DIVIDED = [norm for norm in NORMS if norm.name in ("batch", "group", "instance")]


@pytest.mark.parametrize("norm", DIVIDED, ids=norm_id)
def test_norms_whose_sums_have_pieces(norm, platform, rng):
    x = rng.normal(1e3, 1, SHAPE).astype(np.float32)
    dy = rng.normal(size=SHAPE).astype(np.float32)
    scale, bias = rng.normal(size=(2, 4)).astype(np.float32)
    y, back = jax.vjp(lambda *args: norm(*args, implementation="xla"), x, scale, bias)
    axes, divided = norm.reduction_axes(x.ndim), norm.split(oracle.wide(x))
    h = oracle.standardized(divided, axes, 1e-6)[0].reshape(SHAPE)
    dx = oracle.gradient(divided, norm.split(oracle.wide(dy) * scale), axes, 1e-6)
    exact = dx.reshape(SHAPE), (dy * h).sum((0, 1, 2)), dy.sum((0, 1, 2), dtype=float)
    eps = np.finfo(np.float32).eps
    np.testing.assert_allclose(y, h * scale + bias, atol=4 * eps * np.abs(h * scale).max())
    for found, true in zip(back(dy), exact, strict=True):
        # Some rounding of each of 2048 terms, added up in a tree.
        np.testing.assert_allclose(found, true, atol=16 * eps * np.abs(true).max())
