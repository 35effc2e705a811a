"""Scale and bias of the rank of x, the offset of the scale, and given statistics."""

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from contract import EPS, program
from jax.sharding import AxisType
from maps import DATA, shard_map
from norms import NORMS, norm_id
from transformations import (
    SHAPE,
    assert_same,
    forward_over_reverse,
    grad,
    grad_of_vmap,
    jvp,
    reverse_over_reverse,
    vmap_of_grad,
)

import jaxnorm as jn

X = (4, 6, 5, 10)
# One scale and bias for each example, for each element, and of two kinds that differ.
LEAVES = {
    "examples": ((4, 1, 1, 10), (4, 1, 1, 10)),
    "elements": (X, X),
    "mixed": ((1, 6, 5, 1), (10,)),
}
all_norms = pytest.mark.parametrize("norm", NORMS, ids=norm_id)
all_leaves = pytest.mark.parametrize("kind", LEAVES)


def leaves(norm, kind, shape=X):
    """Shapes of scale and bias. Where parameters span two axes, each example has both."""
    if norm.options.get("axis") == (-2, -1):
        own = shape[-2:]
        return {"examples": ((4, 1, *own),) * 2, "mixed": ((1, 6, 5, 1), own)}.get(
            kind, (shape,) * 2
        )
    return LEAVES[kind]


def draw(shapes, dtype: Any = np.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def summed(a, shape):
    """The sum of an array along the axes that a parameter of that shape lacks."""
    whole = (1,) * (a.ndim - len(shape)) + shape
    axes = tuple(axis for axis, size in enumerate(whole) if size == 1)
    return a.sum(axes, keepdims=True).reshape(shape)


def truth(norm, x, scale, bias, dy, epsilon):
    """y and the gradients of x, scale and bias; of each, the size of what it is a sum of."""
    x, s, b, dy = map(oracle.wide, (x, scale, bias, dy))
    how = {"subtract_mean": norm.subtract_mean}
    axes = norm.reduction_axes(x.ndim)
    h, rstd, _ = oracle.standardized(norm.split(x), axes, epsilon, **how)
    h = h.reshape(x.shape)
    dx = oracle.gradient(norm.split(x), norm.split(dy * s), axes, epsilon, **how).reshape(x.shape)
    right = h * s + b, dx, summed(dy * h, s.shape), summed(dy, b.shape)
    steep = np.abs(norm.split(dy * s) * rstd).max()
    along = [np.sqrt(summed(term**2, a.shape)).max() for term, a in ((dy * h, s), (dy, b))]
    return right, (np.abs(right[0]).max(), steep, *along)


@functools.partial(jax.jit, static_argnums=(0, 1))
def compute(norm, implementation, x, scale, bias, dy):
    f = functools.partial(norm, epsilon=1e-6, implementation=implementation)
    y, pullback = jax.vjp(f, x, scale, bias)
    return y, *pullback(dy)


@all_leaves
@all_norms
def test_values_and_gradients(norm, kind):
    x, scale, bias, dy = draw((X, *leaves(norm, kind), X))
    x = 3 + 2 * x
    results = compute(norm, None, x, scale, bias, dy)
    right, sizes = truth(norm, x, scale, bias, dy, 1e-6)
    for result, expected, size, given in zip(
        results, right, sizes, (x, x, scale, bias), strict=True
    ):
        assert result.shape == given.shape
        # Rounding of the mean, of rstd and of the operations; sums of up to 1200 terms by XLA.
        limit = 4 * EPS * max(size, np.abs(expected).max()) * np.sqrt(x.size / given.size)
        assert np.abs(oracle.wide(result) - expected).max() <= limit


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("norm", [NORMS[1], NORMS[4]], ids=norm_id)
def test_the_kernel_takes_a_scale_for_each_example(norm, dtype):
    """In one call forward and one backward, and as the formula does."""
    args = draw((X, *leaves(norm, "examples"), X), dtype)
    by = lambda implementation: compute(norm, implementation, *args)
    assert program(lambda *args: compute(norm, "kernel", *args), *args).count("custom-call(") == 2
    # Of the gradient of x in bfloat16 the formula rounds three summands.
    units = 16 * EPS if dtype == jnp.float32 else 2 * float(jnp.finfo(dtype).eps)
    for ours, formula in zip(by("kernel"), by("xla"), strict=True):
        assert ours.dtype == dtype
        ours, formula = (np.asarray(a.astype(jnp.float32)) for a in (ours, formula))
        np.testing.assert_allclose(ours, formula, rtol=0, atol=units * np.abs(formula).max())


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("kind", ["mixed", "elements"])
def test_what_the_kernel_does_not_take_is_said(kind):
    """In float32 it standardizes, and scale and bias are applied to that."""
    x, scale, bias = draw((X, *LEAVES[kind]))
    apart = lambda *args: jn.instance_norm(
        args[0], jn.NormParams(*args[1:]), implementation="kernel"
    )
    assert program(apart, x, scale, bias).count("custom-call(") == 1
    x, scale, bias = draw((X, *LEAVES[kind]), jnp.bfloat16)
    with pytest.raises(
        ValueError, match=r"scale and bias must differ only between features, or .* runs"
    ):
        jn.instance_norm(x, jn.NormParams(scale, bias), implementation="kernel")


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("kind", ["mixed", "elements"])
def test_each_platform_decides_what_is_applied_to_a_kernel_s_result(kind):
    """One traced program; on GPUs and TPUs the formula is one pass."""
    x, scale, bias, dy = draw((X, *LEAVES[kind], X))
    traced = compute.trace(NORMS[1], None, x, scale, bias, dy)
    text = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "tpu", "cuda")}
    assert [text[p].count("custom_call @jaxnorm") for p in text] == [2, 0, 0]


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("kind", ["mixed", "elements"])
@pytest.mark.parametrize("norm", [NORMS[1], NORMS[4]], ids=norm_id)
def test_examples_of_vmap_have_their_own_gradients(norm, kind):
    """Of a scale and bias that the kernel does not take."""
    xs, scale, bias, dys = draw(((3, *X), *leaves(norm, kind), (3, *X)))
    each = jax.vmap(compute, (None, None, 0, None, None, 0))(norm, "kernel", xs, scale, bias, dys)
    for i in range(3):
        right, sizes = truth(norm, xs[i], scale, bias, dys[i], 1e-6)
        for result, expected, size in zip(each, right, sizes, strict=True):
            # As above, of one example.
            limit = 4 * EPS * max(size, np.abs(expected).max())
            limit *= np.sqrt(xs[i].size / expected.size)
            assert np.abs(oracle.wide(result[i]) - expected).max() <= limit


# In float64, which no kernel takes: a norm of columns and one of rows.
@pytest.mark.usefixtures("x64", "unoptimized")
@pytest.mark.parametrize("norm", [NORMS[0], NORMS[1]], ids=norm_id)
@pytest.mark.parametrize(
    "transformation",
    [jvp, grad, forward_over_reverse, reverse_over_reverse, grad_of_vmap, vmap_of_grad],
    ids=lambda t: t.__name__,
)
def test_transformations(norm, transformation):
    args = tuple(draw((SHAPE, (8, 1, 4), (1, 3, 1)), np.float64))
    run = lambda f: jax.jit(lambda *args: transformation(f, args))(*args)
    assert_same(
        run(functools.partial(norm, epsilon=0.01)), run(functools.partial(norm.plain, epsilon=0.01))
    )


@pytest.mark.usefixtures("kernel")
def test_vmap_keeps_the_kernel_and_the_leaf_s_shape():
    """Of x alone: all have one leaf, whose gradient is the sum."""
    x, scale, bias, dy = draw(((2, 4, 3, 8), (4, 1, 8), (4, 1, 8), (2, 4, 3, 8)))

    def run(implementation):
        f = lambda x, s, b: jn.layer_norm(x, jn.NormParams(s, b), implementation=implementation)
        y, pullback = jax.vjp(lambda x, s, b: jax.vmap(f, (0, None, None))(x, s, b), x, scale, bias)
        return y, *pullback(dy)

    for ours, formula in zip(run("kernel"), run("xla"), strict=True):
        np.testing.assert_allclose(ours, formula, rtol=0, atol=32 * EPS * np.abs(formula).max())


@pytest.mark.parametrize("norm", [NORMS[0], NORMS[1]], ids=norm_id)
def test_masks(norm):
    x, scale, bias = draw((X, *LEAVES["examples"]))
    where = np.random.default_rng(1).random(X) < 0.7
    h = norm.truth(x, where=where, epsilon=1e-6, **({"axis": -1} if norm.name == "layer" else {}))
    y = norm(x, scale, bias, where=jnp.asarray(where), epsilon=1e-6)
    right = h * oracle.wide(scale) + oracle.wide(bias)
    assert oracle.units(y, right) < 4


@pytest.mark.parametrize("how", ["shard_map", "jit"])
def test_devices_share_the_batch_and_the_leaf(how):
    """Batch norm over eight devices, each with its examples' scales: as on one device."""
    x, scale, bias, dy = draw(((16, 5, 6), (16, 1, 6), (16, 1, 6), (16, 5, 6)))

    def run(x, scale, bias, dy, axis_name=None):
        state = jn.init_batch_norm_state(6)
        f = lambda *args: jn.batch_norm(args[0], state, axis_name, params=jn.NormParams(*args[1:]))[
            0
        ]
        y, pullback = jax.vjp(f, x, scale, bias)
        return y, *pullback(dy)

    alone = run(x, scale, bias, dy)
    args = x, scale, bias, dy
    if how == "shard_map":
        f = functools.partial(run, axis_name="data")
        shared = shard_map("checked", f, DATA, DATA, data=8)(*args)
    else:
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        sharding = jax.sharding.NamedSharding(mesh, DATA)
        shared = jax.jit(run)(*(jax.device_put(a, sharding) for a in args))
    for a, b in zip(shared, alone, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=32 * EPS * np.abs(b).max())


@pytest.mark.parametrize("shape", [(4, 10), (6, 5, 10), (4, 2, 1, 10), (4, 1, 1, 9), (1, 10, 1)])
@pytest.mark.parametrize("leaf", ["scale", "bias"])
def test_other_shapes_are_an_error_with_both(leaf, shape):
    message = (
        rf"{leaf} must have shape \(10,\), .* \(4, 6, 5, 10\), got \({shape[0]}, .* as many axes"
    )
    with pytest.raises(ValueError, match=message):
        jn.group_norm(jnp.ones(X), jn.NormParams(**{leaf: jnp.ones(shape)}), num_groups=2)


@all_norms
def test_an_offset_is_added_in_float32(norm):
    """To the bit what a float32 scale with the offset in it gives."""
    x, scale = draw((X, norm.features(X)))
    scale = (scale / 256).astype(jnp.bfloat16)  # 1 + scale would be rounded away
    offset = norm(x, scale, scale_offset=1.0)
    np.testing.assert_array_equal(offset, norm(x, 1 + scale.astype(jnp.float32)))
    assert np.abs(offset - norm(x, (1 + scale).astype(jnp.float32))).max() > 1e-3


def test_an_offset_in_evaluation():
    x, scale = draw(((4, 3), (3,)))
    state = jn.BatchNormState(x[0], x[1] ** 2, jnp.int32(1))
    norm = functools.partial(jn.batch_norm, x, state, train=False)
    offset, _ = norm(params=jn.NormParams(scale), scale_offset=1.0)
    np.testing.assert_array_equal(offset, norm(params=jn.NormParams(1 + scale))[0])


class TestGiven:
    """`normalize` and `denormalize`."""

    @pytest.mark.parametrize("shape", [(6,), (4, 1, 6), (4, 5, 6)], ids=str)
    def test_against_float64_and_back(self, shape):
        x, mean, var, scale, bias = draw(((4, 5, 6), shape, shape, (6,), (6,)))
        x, var, scale = 1e3 + x, var**2, 2 + scale / 4
        mean = mean + 1e3
        given = jn.Moments(mean, var, jnp.float32(1)), jn.NormParams(scale, bias)
        y = jn.normalize(x, *given, scale_offset=0.5)
        wide = [oracle.wide(a) for a in (x, mean, var, scale, bias)]
        right = (wide[0] - wide[1]) / np.sqrt(wide[2] + 1e-5) * (0.5 + wide[3]) + wide[4]
        assert oracle.units(y, right) < 2
        again = jn.denormalize(y, *given, scale_offset=0.5)
        # y was rounded, and with it at most half a unit of its largest element.
        spread = np.sqrt(wide[2] + 1e-5) / (0.5 + wide[3])
        limit = EPS * (np.abs(right).max() * spread.max() + np.abs(wide[0]).max())
        assert np.abs(oracle.wide(again) - wide[0]).max() < limit

    @pytest.mark.usefixtures("x64")
    @pytest.mark.parametrize("inverse", [False, True], ids=["normalize", "denormalize"])
    def test_gradients_of_everything(self, inverse):
        x, mean, var, scale, bias = draw(((4, 5, 6), (4, 1, 6), (6,), (6,), (1, 5, 1)), np.float64)
        args = x, mean, var**2, 2 + scale, bias

        def ours(x, mean, var, scale, bias):
            f = jn.denormalize if inverse else jn.normalize
            moments = jn.Moments(mean, var, jnp.float64(1))
            return f(x, moments, jn.NormParams(scale, bias), epsilon=0.1)

        def plain(x, mean, var, scale, bias):
            row = lambda a: a.reshape((1,) * (3 - a.ndim) + a.shape)
            mean, std, scale, bias = row(mean), row(jnp.sqrt(var + 0.1)), row(scale), row(bias)
            return (x - bias) / scale * std + mean if inverse else (x - mean) / std * scale + bias

        def run(f):
            g = lambda *args: jnp.sum(jnp.sin(f(*args)))
            return jax.grad(g, range(5))(*args), jax.jvp(f, args, args)

        assert_same(jax.jit(lambda: run(ours))(), jax.jit(lambda: run(plain))())

    def test_the_backward_pass_keeps_x_alone(self):
        x = jnp.ones((8, 16, 32), jnp.bfloat16)
        moments = jn.Moments(jnp.zeros(32), jnp.ones(32), jnp.float32(1))
        params = jn.init_params(32)
        for f in (jn.normalize, jn.denormalize):
            _, backward = jax.vjp(f, x, moments, params)
            kept = [a for a in jax.tree.leaves(backward) if a.size >= x.size]
            assert [(a.shape, a.dtype) for a in kept] == [(x.shape, x.dtype)]

    def test_with_a_variance_of_zero_and_no_epsilon(self):
        moments = jn.Moments(jnp.ones(2), jnp.zeros(2), jnp.float32(1))
        x = jnp.array([[1.0, 3.0]])
        np.testing.assert_array_equal(jn.normalize(x, moments, epsilon=0.0), [[0, 0]])
        np.testing.assert_array_equal(jn.denormalize(x, moments, epsilon=0.0), [[1, 1]])

    def test_wrong_arguments(self):
        x, moments = jnp.ones((4, 6)), jn.Moments(jnp.ones(5), jnp.ones(5), jnp.float32(1))
        message = r"the mean must have shape \(6,\), .*got \(5,\); .* as many axes as x has"
        with pytest.raises(ValueError, match=message):
            jn.normalize(x, moments)
        with pytest.raises(TypeError, match="moments must be a Moments, got tuple"):
            jn.denormalize(x, (jnp.ones(6), jnp.ones(6)))  # pyright: ignore[reportArgumentType]
        complex_var = jn.Moments(jnp.ones(6), jnp.ones(6, jnp.complex64), jnp.float32(1))
        with pytest.raises(TypeError, match="the variance must be real, got complex64"):
            jn.normalize(x.astype(jnp.complex64), complex_var)
        with pytest.raises(ValueError, match="scale_offset must be added to a scale"):
            jn.normalize(x, jn.moments(x, 0), scale_offset=1.0)

    def test_as_keras_does(self):
        os.environ.setdefault("KERAS_BACKEND", "jax")
        keras = pytest.importorskip("keras", reason="Keras is in the extra 'peers'")
        x, data = draw(((4, 6), (50, 6)))
        layer = keras.layers.Normalization()
        layer.adapt(np.asarray(3 * data + 1))
        ours = jn.normalize(x, jn.moments(3 * data + 1, 0), epsilon=0.0)
        np.testing.assert_allclose(ours, layer(np.asarray(x)), rtol=0, atol=4e-6)
        undo = keras.layers.Normalization(invert=True)
        undo.adapt(np.asarray(3 * data + 1))
        back = jn.denormalize(x, jn.moments(3 * data + 1, 0), epsilon=0.0)
        np.testing.assert_allclose(back, undo(np.asarray(x)), rtol=0, atol=1e-5)
