"""The contract of the formulas and each kernel: values and derivatives of NumPy in float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from contract import SHAPES, assert_kept, compute, example_of
from norms import NORMS, norm_id

import jaxnorm as jn

EACH_NORM = pytest.mark.parametrize("norm", NORMS, ids=norm_id)
KERNELS = pytest.mark.parametrize(
    "implementation", ["kernel-baseline", "kernel-avx2", "kernel-avx512"], indirect=True
)


def check(norm, implementation, example, epsilon):
    results = compute(norm, implementation, epsilon, example)
    assert [a.dtype for a in results[:4]] == [a.dtype for a in example[:1] + example[:3]]
    assert_kept(norm, example, results, epsilon, formula=implementation == "xla")


@EACH_NORM
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_float32(norm, implementation, shape):
    norm = norm.with_groups(shape)
    check(norm, implementation, example_of(norm, shape), 1e-6)


@pytest.mark.parametrize("params", [jnp.bfloat16, jnp.float32], ids=lambda t: t.__name__)
@pytest.mark.parametrize("shape", ["1000-features", "1000-positions"])
@EACH_NORM
def test_bfloat16(norm, implementation, shape, params):
    norm = norm.with_groups(SHAPES[shape])
    check(norm, implementation, example_of(norm, SHAPES[shape], jnp.bfloat16, params), 1e-6)


# With epsilon 0 the squares must not leave the range of float32 (docs/numerics.md).
@pytest.mark.parametrize(
    ("mean", "std"), [(1e4, 1), (-3e5, 1), (0, 1e18), (0, 1e-15)], ids=lambda v: f"{v:g}"
)
@pytest.mark.parametrize("shape", ["1000-features", "1000-positions"])
@EACH_NORM
def test_large_means_and_extreme_scales(norm, implementation, shape, mean, std):
    norm = norm.with_groups(SHAPES[shape])
    check(norm, implementation, example_of(norm, SHAPES[shape], mean=mean, std=std), 0.0)


@EACH_NORM
def test_constants(norm, implementation):
    # Groups of fewer elements than a vector holds, and of more.
    for shape in [(2, 3, 2), SHAPES["1000-positions"]]:
        norm = norm.with_groups(shape)
        for value in (1.1, -1e4, 1e18):
            check(norm, implementation, example_of(norm, shape, mean=value, std=0), 1e-6)


@KERNELS
@EACH_NORM
def test_values_that_drift(norm, implementation, rng):
    """The kernel subtracts the mean of the tiles before, which may be far from the tile's own."""
    positions = np.arange(2**14)
    drifts = [1e4 * (positions < 70), 1e3 * (positions // 64 % 2), 1e4 * positions / positions.size]
    for drift in drifts:
        rows = norm.name in ("layer", "rms")
        x = rng.standard_normal((2, 2, drift.size) if rows else (1, drift.size, 4), np.float32)
        x += (drift if rows else drift[:, None]).astype(np.float32)
        here = norm.with_groups(x.shape)
        y = jax.jit(functools.partial(here, implementation=implementation))(x)
        assert oracle.units(y, here.truth(x, **here.options)) <= 3


def pattern(a):
    """Which elements are numbers, NaN, inf, -inf."""
    return np.where(np.isfinite(a), 0.0, a)


@KERNELS
@EACH_NORM
def test_nan_and_infinity_are_where_the_formula_has_them(norm, implementation):
    bad = [{...: np.nan}, {0: np.nan}, {1: np.inf}, {2: -np.inf}, {0: np.inf, 9: -np.inf}]
    for shape, replaced in itertools.product([(3, 5, 6), (2, 200, 16)], bad):
        norm = norm.with_groups(shape)
        example = example_of(norm, shape)
        for index, number in replaced.items():
            example.x.reshape(-1)[index] = number
        results = compute(norm, implementation, 1e-6, example)
        expected = compute(norm, "xla", 1e-6, example)
        for name in ("y", "dx", "dscale", "dbias"):
            ours, formula = (np.asarray(getattr(r, name)) for r in (results, expected))
            np.testing.assert_array_equal(pattern(ours), pattern(formula), name)
            finite = np.isfinite(formula)
            # Twice what either may be off by, for elements of up to about ten.
            np.testing.assert_allclose(ours[finite], formula[finite], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("param", ["scale", "bias"])
@KERNELS
@EACH_NORM
def test_a_nan_of_all_ones_stays_one_in_bfloat16(norm, implementation, param):
    """Rounded up as if it were a number, it would be zero."""
    example = example_of(norm, (3, 40, 16), jnp.bfloat16)
    getattr(example, param).reshape(-1)[:2].view(np.int32)[:] = -1, 2**31 - 1
    results = compute(norm, implementation, 1e-6, example)
    expected = compute(norm, "xla", 1e-6, example)
    assert np.isnan(results.y).any()
    for ours, formula in zip(results, expected, strict=True):
        np.testing.assert_array_equal(np.isnan(ours), np.isnan(formula))


@pytest.mark.parametrize("params", [(True, False), (False, True), (False, False)], ids=str)
@KERNELS
@EACH_NORM
def test_without_scale_or_bias(norm, implementation, params):
    example = example_of(norm, (3, 40, 12))

    @functools.partial(jax.jit, static_argnums=0)
    def run(left_out, scale, bias):
        given = [
            a if there or not left_out else None
            for a, there in zip((scale, bias), params, strict=True)
        ]
        y, pullback = jax.vjp(
            functools.partial(norm, implementation=implementation), example.x, *given
        )
        return y, pullback(example.dy)

    scale = example.scale if params[0] else np.ones_like(example.scale)
    bias = example.bias if params[1] else np.zeros_like(example.bias)
    (y, gradients), (full_y, full_gradients) = run(True, scale, bias), run(False, scale, bias)
    # The same but for where a product and a sum are rounded once.
    assert oracle.units(y, full_y) <= 1
    for ours, wanted, right in zip(gradients, (True, *params), full_gradients, strict=True):
        assert (ours is not None) == wanted
        assert not wanted or oracle.units(ours, right) <= 2


@pytest.mark.parametrize(
    "function",
    [
        functools.partial(jn.layer_norm, axis=0),
        functools.partial(jn.layer_norm, axis=(0, 2)),
        functools.partial(jn.group_norm, num_groups=2, feature_axis=1),
        functools.partial(jn.instance_norm, feature_axis=1),
        lambda x, **options: jn.batch_norm(
            x, jn.init_batch_norm_state(4), feature_axis=1, **options
        )[0],
    ],
    ids=["layer-first", "layer-two-axes", "group", "instance", "batch"],
)
def test_layouts_that_no_kernel_takes_are_the_formula_s(function, rng):
    x = rng.standard_normal((3, 4, 6), np.float32)
    np.testing.assert_array_equal(function(x), function(x, implementation="xla"))


@EACH_NORM
def test_layouts_in_memory_that_are_not_x_s_own(norm, implementation, rng):
    """Transposed, strided, reversed: XLA gives the kernel what it asked for."""
    x = rng.standard_normal((8, 6, 10), np.float32)
    f = functools.partial(norm, implementation=implementation)
    views = [lambda a: a.T[:, ::2], lambda a: a[::-1, :, 1:9], lambda a: a.transpose(0, 2, 1)]
    for view in views:
        inside = jax.jit(lambda x, view=view: f(view(x)))(x)
        assert oracle.units(inside, norm.truth(view(x), **norm.options)) <= 4
