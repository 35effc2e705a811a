"""The TPU's kernel, interpreted on the CPU: the contract, its blocks, races, devices, refusals."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from changes import changes, with_kernels
from contract import EPS, assert_kept, compute, example_of
from jax import export
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, PartitionSpec
from norms import NORMS

import jaxnorm as jn
from jaxnorm import kernels
from jaxnorm.kernels import tpu
from jaxnorm.kernels.tpu import blocks

# The interpreter is slow to compile, and its programs do not resemble those of a TPU.
pytestmark = [pytest.mark.usefixtures("unoptimized"), pytest.mark.thorough]
ROWS = {norm.name: norm for norm in (NORMS[1], NORMS[3])}
EACH_NORM = pytest.mark.parametrize("norm", ROWS.values(), ids=ROWS)
SHAPES = {
    "1-feature": (2, 3, 1),
    "1-row": (1, 768),
    "1-position": (5, 1, 7),
    "1000-features": (3, 7, 1000),
    "examples, the last block has fewer": (17, 7, 100),
    "another axis fills the tiles, the last block has fewer rows": (8, 197, 40),
    "many-rows": (3000, 100),
    "long-rows": (9, 2500),
}


@pytest.fixture(autouse=True, scope="module")
def interpreted():
    """The kernel is in the table as the CPU's, without a TPU."""
    with changes() as change:
        change(kernels, "KERNELS", with_kernels(cpu=tpu))
        change(tpu, "interpret", True)
        yield


@pytest.fixture
def small_vmem(change):
    """As if the chip held few rows."""

    def hold(rows, k):
        needs = tpu._FORWARD | {"arrays": tpu._BACKWARD["arrays"]}
        a_row, fixed = blocks._bytes(k, 4, **needs)
        change(blocks, "DEFAULT_LIMIT", blocks._SPARE + fixed + rows * a_row)

    return hold


def check(norm, example, epsilon=1e-6):
    results = compute(norm, "kernel", epsilon, example)
    assert [a.dtype for a in results[:4]] == [a.dtype for a in example[:1] + example[:3]]
    assert_kept(norm, example, results, epsilon, formula=False)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_float32(shape):
    check(ROWS["layer"], example_of(ROWS["layer"], shape))
    if shape[-1] > 1000:  # the norms differ in nothing but the mean
        check(ROWS["rms"], example_of(ROWS["rms"], shape))


@EACH_NORM
def test_bfloat16(norm):
    params = jnp.bfloat16 if norm.subtract_mean else jnp.float32
    check(norm, example_of(norm, (3, 7, 1000), jnp.bfloat16, params))


@EACH_NORM
@pytest.mark.parametrize(
    ("mean", "std"), [(1e4, 1), (-3e5, 1), (0, 1e18), (0, 1e-15)], ids=lambda v: f"{v:g}"
)
def test_large_means_and_extreme_scales(norm, mean, std):
    check(norm, example_of(norm, (3, 7, 1000), mean=mean, std=std), 0.0)


@EACH_NORM
def test_constants(norm):
    for value in (1.1, -1e4, 1e18):
        check(norm, example_of(norm, (3, 7, 1000), mean=value, std=0))


def test_an_example_may_be_larger_than_a_block(small_vmem):
    small_vmem(16, 256)
    plan = blocks.plan((3, 150, 256), 4, batch=1, k=256, arrays=3, features=4)
    assert (plan.examples, plan.rows, plan.steps) == (1, 16, (3, 10))
    norm = ROWS["layer"]
    check(norm, example_of(norm, (3, 150, 256)))


def with_residual(norm, x, residual, dy, dtotal, scale):
    """y, the sum, and the gradients; the kernel's functions are called without JAX's rules."""
    k = x.shape[-1]
    block, how = (x.size // k, 1, 1, k), {"subtract_mean": norm.subtract_mean, "epsilon": 1e-6}

    def run(x, residual, dy, dtotal, scale):
        y, total, high, low, _, rstd = tpu.value(
            x, residual, scale, None, block=block, batch=1, **how
        )
        assert total is not None
        high, low = (None if a is None else a[None] for a in (high, low))
        both = {"block": block, "batch": 1, "wanted": (True, True)}
        return y, total, *tpu.cotangent(total, dy, dtotal, scale, high, low, rstd[None], **both)

    return jax.jit(run)(x, residual, dy, dtotal, scale)


def residual_arguments(shape, dtype):
    rng = np.random.default_rng(0)
    draw = lambda: (rng.standard_normal(shape, np.float32) + 1).astype(dtype)
    return draw(), draw(), draw(), draw(), rng.standard_normal(shape[-1], np.float32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda t: t.__name__)
@EACH_NORM
def test_a_residual(norm, dtype):
    args = residual_arguments((17, 7, 40), dtype)
    y, total, dx, dscale, dbias = with_residual(norm, *args)
    assert y.dtype == total.dtype == dx.dtype == dtype
    x, residual, dy, dtotal, scale = map(oracle.wide, args)
    h, rstd, _ = oracle.standardized(x + residual, -1, 1e-6, subtract_mean=norm.subtract_mean)
    later = h + (oracle.wide(total) - (x + residual)) * rstd  # by the sum as it was rounded
    g = dy * scale
    mean = g.mean(-1, keepdims=True) * norm.subtract_mean
    right = rstd * (g - mean - later * (g * later).mean(-1, keepdims=True)) + dtotal
    for ours, true in zip((y, total, dx), (h * scale, x + residual, right), strict=True):
        limit = (0.51 * float(jnp.finfo(dtype).eps) + 4 * EPS) * np.abs(true).max()
        np.testing.assert_allclose(oracle.wide(ours), true, rtol=0, atol=limit)
    assert oracle.units(dscale, (dy * later).sum((0, 1))[None]) <= 4
    assert oracle.units(dbias, dy.sum((0, 1))[None]) <= 1


@pytest.mark.parametrize("shape", [(9, 7, 40)], ids=str)
def test_no_core_touches_what_another_copies(shape, change):
    """With two cores, as of v5p, and their blocks in any order."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # where races are told

    args = residual_arguments(shape, jnp.float32)
    expected = with_residual(ROWS["layer"], *args)
    params = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2, random_seed=1)
    change(tpu, "interpret", params)
    for ours, plain in zip(with_residual(ROWS["layer"], *args), expected, strict=True):
        assert oracle.units(ours, np.asarray(plain)) <= 4
    assert interpret_pallas_call.races is not None
    assert not interpret_pallas_call.races.races_found


def test_sums_over_many_rows_are_as_exact_as_over_few():
    """Each of 40000 float32 additions would round by up to a unit of the sum."""
    x = np.random.default_rng(0).standard_normal((40_000, 8), np.float32)
    dy = np.full(x.shape, 0.1, np.float32)
    f = functools.partial(ROWS["layer"], implementation="kernel")
    ones = np.ones(8, np.float32)
    _, dscale, dbias = jax.jit(lambda x: jax.vjp(f, x, ones, ones)[1](dy))(x)
    h, _, _ = oracle.standardized(x, -1, 1e-6)
    assert oracle.units(dbias, oracle.wide(dy).sum(0)) <= 1
    size = np.sqrt((h**2).sum(0)).max() * 0.1  # of a sum of such numbers
    assert np.abs(dscale - (oracle.wide(dy) * h).sum(0)).max() <= 4 * EPS * size


@pytest.mark.parametrize("given", [(True, False), (False, True), (False, False)], ids=str)
def test_without_scale_or_bias(given):
    norm = ROWS["rms" if given[0] else "layer"]
    example = example_of(norm, (3, 40, 12))

    def run(implementation):
        params = [a if there else None for a, there in zip(example[1:3], given, strict=True)]
        f = functools.partial(norm, implementation=implementation)

        def both(x, dy):
            y, pullback = jax.vjp(f, x, *params)
            return y, *pullback(dy)

        return jax.jit(both)(example.x, example.dy)

    for ours, formula in zip(run("kernel"), run("xla"), strict=True):
        assert (ours is None) == (formula is None)
        assert ours is None or oracle.units(ours, np.asarray(formula)) <= 4


@pytest.mark.parametrize(
    ("norm", "batch"),
    [(ROWS["layer"], (3,)), (ROWS["rms"], (2, 3)), (NORMS[2], (3,))],
    ids=["layer", "rms", "layer-two-axes"],
)
def test_vmap_gives_each_example_gradients_of_its_own(norm, batch):
    rng = np.random.default_rng(0)
    shape = (4, 5, 24)
    x, dy = (rng.standard_normal((*batch, *shape), np.float32) for _ in range(2))
    scale, bias = (rng.standard_normal(norm.features(shape), np.float32) for _ in range(2))

    def gradients(implementation):
        f = functools.partial(norm, implementation=implementation)
        of_one = lambda x, dy: jax.vjp(f, x, scale, bias)[1](dy)
        for _ in batch:
            of_one = jax.vmap(of_one)
        return jax.jit(of_one)(x, dy)

    for ours, formula in zip(gradients("kernel"), gradients("xla"), strict=True):
        assert ours.shape == formula.shape
        assert oracle.units(ours, np.asarray(formula)) <= 8  # both are off by some


@EACH_NORM
def test_nan_and_infinity_are_where_the_formula_has_them(norm):
    pattern = lambda a: np.where(np.isfinite(a), 0.0, a)
    for replaced in (
        {...: np.nan},
        {0: np.nan},
        {1: np.inf},
        {2: -np.inf},
        {0: np.inf, 9: -np.inf},
    ):
        example = example_of(norm, (3, 5, 6))
        for index, number in replaced.items():
            example.x.reshape(-1)[index] = number
        results = compute(norm, "kernel", 1e-6, example)
        expected = compute(norm, "xla", 1e-6, example)
        for name in ("y", "dx", "dscale", "dbias"):
            ours, formula = (np.asarray(getattr(r, name)) for r in (results, expected))
            np.testing.assert_array_equal(pattern(ours), pattern(formula), name)
            finite = np.isfinite(formula)
            np.testing.assert_allclose(ours[finite], formula[finite], rtol=1e-5, atol=1e-5)


def test_in_shard_map_each_device_calls_its_own():
    norm = ROWS["layer"]
    example = example_of(norm, (16, 3, 12))
    data, everywhere = PartitionSpec("data"), PartitionSpec()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def both(implementation, x, scale, bias, dy):
        f = functools.partial(norm, implementation=implementation)
        if implementation == "kernel":
            f = jax.shard_map(
                f,
                mesh=mesh,
                in_specs=(data, everywhere, everywhere),
                out_specs=data,
                check_vma=False,  # with it Pallas can compile a kernel, but not interpret it
            )
        y, pullback = jax.vjp(f, x, scale, bias)
        return y, *pullback(dy)

    args = (*map(jnp.asarray, example[:3]), jnp.asarray(example.dy))
    ours, formula = (
        jax.jit(functools.partial(both, implementation))(*args)
        for implementation in ("kernel", "xla")
    )
    for a, b in zip(ours, formula, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


@EACH_NORM
def test_derivatives_that_the_kernel_does_not_compute_are_the_formula_s(norm):
    x, tangent = np.random.default_rng(0).standard_normal((2, 3, 10), np.float32)

    def results(implementation):
        loss = lambda x: jnp.sum(jnp.sin(norm(x, implementation=implementation)))
        second = lambda x: jax.jvp(jax.grad(loss), (x,), (tangent,))[1]
        return jax.jit(lambda x: (jax.jvp(loss, (x,), (tangent,)), second(x)))(x)

    for a, b in zip(*(jax.tree.leaves(results(i)) for i in ("kernel", "xla")), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1, np.abs(b).max()))


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda x: jn.layer_norm(x, where=x > 0), "it takes no mask"),
        (lambda x: jn.layer_norm(x.astype(jnp.float16)), "it takes float32 or bfloat16"),
        (lambda x: jn.group_norm(x, num_groups=2), "it takes layer and rms norm"),
        (lambda x: jn.layer_norm(x, axis=0), "it takes layer and rms norm"),
        (lambda x: jn.layer_norm(x[:0]), "x has no elements"),
        (
            lambda x: jn.rms_norm(jnp.ones((1, 2**17))),
            "it takes up to .* features, and x has 131072",
        ),
    ],
    ids=["mask", "float16", "group", "first-axis", "empty", "long"],
)
def test_it_refuses_by_name(call, reason, monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, "kernel")
    with pytest.raises(ValueError, match=rf"implementation='kernel' must.*{reason}"):
        call(jnp.ones((4, 6)))


def test_it_refuses_symbolic_sizes():
    (n,) = export.symbolic_shape("n")
    f = jax.jit(functools.partial(jn.layer_norm, implementation="kernel"))
    with pytest.raises(ValueError, match="over the last axes, of known sizes, only"):
        export.export(f)(jax.ShapeDtypeStruct((n, 8), jnp.float32))


def test_it_has_to_be_asked_for():
    assert jn.implementations()["tpu"].startswith("xla: it was never run on a TPU: ask for it by")


def test_importing_jaxnorm_does_not_import_pallas():
    code = "import jaxnorm, sys; assert 'jax.experimental.pallas' not in sys.modules"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
