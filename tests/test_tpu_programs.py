"""The TPU's kernel as the compiler for TPUs takes it; no TPU is needed."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import export

import jaxnorm as jn
from benchmarks.chips import CHIPS, compiled, compiled_over
from benchmarks.pallas_bytes import vmem
from jaxnorm.kernels import tpu
from jaxnorm.kernels.tpu import blocks

# conftest.py keeps compiled programs; those of a chip that is not there can't be loaded again.
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")

CHIP = CHIPS["v5e"]
NORMS = {"layer": jn.layer_norm, "rms": jn.rms_norm}
CALLS = ("jaxnorm_{}_forward", "jaxnorm_{}_backward")


@pytest.fixture
def chip():
    """Skips a test where there is no compiler for TPUs."""
    if CHIP.missing:
        pytest.skip("libtpu is in the extra 'tpu'")
    return CHIP


def like(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def gradients(norm, x, scale, bias=None):
    """y and all gradients, by the kernel."""
    f = lambda x, *params: NORMS[norm](x, jn.NormParams(*params), implementation="kernel")
    y, pullback = jax.vjp(f, x, scale, *([] if bias is None else [bias]))
    return y, *pullback(jnp.sin(y))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((256, 197, 768), jnp.bfloat16),
        ((255, 197, 768), jnp.bfloat16),
        ((17, 7, 1000), jnp.float32),
        ((1, 7), jnp.float32),
        ((2048, 16384), jnp.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("norm", NORMS)
def test_it_compiles_and_fits(norm, shape, dtype, chip):
    features = [like(shape[-1])] * (2 if norm == "layer" else 1)
    program = compiled(
        chip, functools.partial(gradients, norm), (like(*shape, dtype=dtype), *features)
    )
    text = program.as_text()
    assert all(call.format(norm) in text for call in CALLS)
    assert 0 < vmem(text) <= blocks.DEFAULT_LIMIT


def test_the_longest_row_compiles(chip):
    k = blocks.longest_row(2, **tpu._with_residual(tpu._BACKWARD, True))
    x, scale, block = like(64, k, dtype=jnp.bfloat16), like(k), (64, 1, 1, k)

    def both(x, residual, dy, dtotal, scale):
        how = {"batch": 1, "epsilon": 1e-6, "subtract_mean": True}
        y, total, high, low, _, rstd = tpu.value(x, residual, scale, scale, block=block, **how)
        assert total is not None
        high, low = (None if a is None else a[None] for a in (high, low))
        how = {"batch": 1, "wanted": (True, True)}
        return y, tpu.cotangent(total, dy, dtotal, scale, high, low, rstd[None], block=block, **how)

    text = compiled(chip, both, (x, x, x, x, scale)).as_text()
    assert blocks.DEFAULT_LIMIT < vmem(text) <= blocks.LIMIT


def test_in_shard_map_each_chip_calls_its_own(chip):
    def both(x, scale, bias):
        y, dx, dscale, _ = gradients("layer", x, scale, bias)
        return dx, jax.lax.psum(jnp.sum(y), "data") + jnp.sum(dscale)

    args, sharded = (like(64, 128, 256), like(256), like(256)), (True, False, False)
    text = compiled_over(chip, both, args, sharded, axis_name="data").as_text()
    assert all(call.format("layer") in text for call in CALLS)
    assert "all-gather" not in text


def test_an_exported_program_has_the_kernel_in_it():
    f = jax.jit(functools.partial(gradients, "layer"))
    exported = export.export(f, platforms=["tpu"])(like(64, 256), like(256), like(256))
    text = export.deserialize(exported.serialize()).mlir_module()
    assert "tpu_custom_call" in text
