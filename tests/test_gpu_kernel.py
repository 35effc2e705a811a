"""The GPU's kernel: interpreted on the CPU, and compiled ahead of time for a GPU."""

import functools
import itertools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from changes import with_kernels
from contract import Results, assert_kept, compute, example_of
from norms import NORMS

import jaxnorm as jn
from benchmarks.accelerators.chips import CHIPS, compiled, compiled_over
from jaxnorm import kernels
from jaxnorm.kernels import gpu
from jaxnorm.kernels.gpu.tiles import tile
from jaxnorm.kernels.request import Request

# conftest.py keeps compiled programs; those of a chip that is not there can't be loaded again.
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")

ROWS = [norm for norm in NORMS if norm.name in ("layer", "rms") and norm.options["axis"] == -1]


@pytest.fixture
def interpreted(change, capfd):
    """The kernel's functions run on the CPU, and no two warpgroups may race.

    They are called directly: what interprets them calls back to Python in order, which JAX does not
    allow inside of a primitive.
    """
    if gpu.unavailable_reason():
        pytest.skip("Mosaic GPU is interpreted from jax 0.11 on")
    from jax.experimental.pallas import mosaic_gpu

    from jaxnorm.kernels.gpu import rows

    plgpu: Any = mosaic_gpu  # older versions of JAX lack the interpreter
    change(rows, "interpret", plgpu.InterpretGPUParams(detect_races=True))
    yield
    assert "RACE DETECTED" not in capfd.readouterr().out


def results_of(norm, example, epsilon, batch=1):
    """As `compute` gives them; the tangent is the formula's. Sums are of each of `batch` parts."""
    k = example.scale.size
    rows = example.x.size // k
    scale, bias = (jnp.asarray(a, jnp.float32) for a in (example.scale, example.bias))
    y, _, high, low, _, rstd = gpu.forward(
        jnp.asarray(example.x),
        None,
        scale,
        bias,
        block=(rows, 1, 1, k),
        batch=1,
        epsilon=epsilon,
        subtract_mean=norm.subtract_mean,
    )
    gradients: Any = gpu.vjp(
        jnp.asarray(example.x),
        jnp.asarray(example.dy),
        None,
        scale,
        high,
        low,
        rstd,
        block=(rows // batch, 1, 1, k),
        batch=batch,
        wanted=(True, True),
    )
    dx, dscale, dbias = gradients
    if batch == 1:
        dscale, dbias = dscale[0], dbias[0]
    return Results(y, dx, dscale, dbias, compute(norm, "xla", epsilon, example).ty)


LAYER, RMS = ROWS
# A row of one warp and of all; of two warpgroups; a number of rows that the warps do not divide.
SHORT, ODD, NARROW, LONG = (8, 2, 256), (3, 1, 512), (2, 2, 192), (2, 1, 8192)
CASES = [
    (LAYER, SHORT, "float32", 1e4, 1),
    (LAYER, SHORT, "float32", 0, 1e18),
    (LAYER, SHORT, "float32", 3, 0),
    (LAYER, ODD, "bfloat16", 1, 1),
    (LAYER, NARROW, "bfloat16", 1, 1),
    (LAYER, LONG, "float32", 1e4, 1),
    (RMS, SHORT, "bfloat16", 1, 1),
    (RMS, ODD, "float32", 0, 1e18),
]


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("norm", "shape", "dtype", "mean", "std"), CASES)
def test_the_contract(norm, shape, dtype, mean, std):
    example = example_of(norm, shape, dtype, mean=mean, std=std)
    epsilon = 0.0 if std > 1 else 1e-6
    results = results_of(norm, example, epsilon)
    assert_kept(norm, example, results, epsilon, formula=True)  # its sums are in float32


@pytest.mark.usefixtures("interpreted")
def test_numbers_that_are_none_are_where_the_formula_has_them():
    example = example_of(LAYER, (4, 1, 128))
    example.x.reshape(-1, 128)[0, 3], example.x.reshape(-1, 128)[2, 5] = np.nan, np.inf
    right = compute(LAYER, "xla", 1e-6, example)
    for ours, formula in zip(results_of(LAYER, example, 1e-6), right, strict=True):
        np.testing.assert_array_equal(np.isnan(ours), np.isnan(formula))


@pytest.mark.usefixtures("interpreted")
def test_each_part_of_a_batch_has_its_own_gradients():
    example = example_of(LAYER, (3, 8, 128))
    together = results_of(LAYER, example, 1e-6, batch=3)
    for part in range(3):
        own = {name: getattr(example, name)[part] for name in ("x", "tx", "dy")}
        alone = results_of(LAYER, example._replace(**own), 1e-6)
        np.testing.assert_array_equal(together.dscale[part], alone.dscale)
        np.testing.assert_array_equal(together.dbias[part], alone.dbias)


@pytest.mark.usefixtures("interpreted")
def test_the_sum_with_a_residual_is_normalized_before_it_is_rounded(rng):
    rows, k = 4, 128
    x, residual = (jnp.asarray(rng.standard_normal((rows, k)), jnp.bfloat16) for _ in range(2))
    block = (rows, 1, 1, k)
    y, residual_sum, high, low, _, rstd = gpu.forward(
        x, residual, None, None, block=block, batch=1, epsilon=1e-6, subtract_mean=True
    )
    assert residual_sum is not None
    exact = x.astype(jnp.float32) + residual.astype(jnp.float32)
    np.testing.assert_array_equal(residual_sum, exact.astype(jnp.bfloat16))
    np.testing.assert_array_equal(y, jn.layer_norm(exact, implementation="xla").astype(y.dtype))
    dy = jnp.ones_like(x)
    gradient = lambda d_residual_sum: gpu.vjp(
        residual_sum,
        dy,
        d_residual_sum,
        None,
        high,
        low,
        rstd,
        block=block,
        batch=1,
        wanted=(False, False),
    )[0]
    alone, both = (gradient(d).astype(jnp.float32) for d in (None, dy))
    # Each of the two is rounded to bfloat16 once, by half a unit of its largest element.
    tol = float(jnp.finfo(jnp.bfloat16).eps) * float(jnp.maximum(abs(alone).max(), abs(both).max()))
    np.testing.assert_allclose(both - alone, dy.astype(jnp.float32), rtol=0, atol=tol)


def test_tiles():
    """The rule in `WIDTHS`, and that a tile is whole rows or whole segments."""
    for rows, k in itertools.product((8, 4096, 7), range(32, 9000, 32)):
        t = tile(rows, k)
        short = k <= 1024 and rows % 4 == 0 and k % 64 == 0
        middle = k <= 4096 and k % 256 == 0
        assert (t is not None) == (short or middle or (k <= 8192 and k % 512 == 0)), (rows, k)
        if t:
            assert rows % t.rows == 0
            assert t.segments == 1 or t.rows == 1
            assert t.rows * k % (128 * t.vector * t.warpgroups) == 0
            assert t.programs >= 132


def test_refusals(monkeypatch, change):
    monkeypatch.setattr(gpu, "unavailable_reason", lambda: None)
    change(kernels, "KERNELS", with_kernels(cpu=gpu))
    huge = Request((2**20, 1, 1, 4096), jnp.dtype("float32"), jnp.dtype("float32"))
    assert "fewer than 2**31 elements" in (gpu.unsupported_reason(huge) or "")
    x = jnp.ones((8, 128))
    for norm, sentence in (
        (lambda x: jn.layer_norm(x[:, :100], implementation="kernel"), "a multiple of 64"),
        (
            lambda x: jn.layer_norm(x, where=x > 0, implementation="kernel"),
            "it does not support masks",
        ),
        (lambda x: jn.instance_norm(x[None], implementation="kernel"), "layer and rms norm"),
        (lambda x: jn.rms_norm(x.astype(jnp.float16), implementation="kernel"), "float32 or bf"),
    ):
        with pytest.raises(ValueError, match=f"implementation='kernel' must.*{sentence}"):
            norm(x)


def test_without_a_gpu_it_has_to_be_asked_for():
    assert "no NVIDIA GPU here" in (gpu.opt_in_reason() or "")


def test_the_default_depends_on_the_devices_at_each_lowering(monkeypatch):
    gpus = lambda *kinds: lambda backend: [types.SimpleNamespace(device_kind=k) for k in kinds]
    monkeypatch.setattr(jax, "devices", gpus(gpu.VERIFIED, gpu.VERIFIED))
    assert gpu.opt_in_reason() is None
    monkeypatch.setattr(jax, "devices", gpus(gpu.VERIFIED, "NVIDIA A100"))
    assert "this is an NVIDIA A100" in (gpu.opt_in_reason() or "")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_compiles_for_an_h100(dtype):
    chip = CHIPS["H100"]
    if chip.missing:
        pytest.skip("the compiler for NVIDIA GPUs is in the extra 'cuda'")
    if gpu.unavailable_reason():
        pytest.skip("Mosaic GPU is interpreted from jax 0.11 on")
    like = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)

    def both(x, scale):
        f = lambda x, scale: jn.layer_norm(x, jn.NormParams(scale), implementation="kernel")
        y, pullback = jax.vjp(f, x, scale)
        return pullback(y)

    for k in (768, 4096, 8192):
        x = jax.ShapeDtypeStruct((1056, k), dtype)
        text = compiled(chip, both, (x, like((k,)))).as_text()
        assert text.count("mosaic_gpu") >= 2
    x = jax.ShapeDtypeStruct((1056, 768), dtype)
    program = compiled_over(chip, both, (x, like((768,))), (True, False), 8, "data")
    assert "all-gather" not in program.as_text()
