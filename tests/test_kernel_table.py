"""The table of kernels, with a kernel of thirty lines as an example."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jaxnorm as jn
from jaxnorm import kernels
from jaxnorm.kernels.request import rows_of


@jax.jit
def tiny_forward(x, scale, epsilon):
    mean = x.mean(1, keepdims=True)
    var = x.var(1, keepdims=True)
    rstd = jax.lax.rsqrt(var + epsilon)
    return (x - mean) * rstd * scale, mean, jnp.zeros_like(mean), var, rstd


@jax.jit
def tiny_vjp(x, dy, scale, mean, rstd):
    h, g = (x - mean) * rstd, dy * scale[None, None]
    dx = rstd * (g - g.mean(2, keepdims=True) - h * (g * h).mean(2, keepdims=True))
    return dx, (dy * h).sum(1)


class Tiny:
    """Layer norm of float32 rows with a scale and no bias, and nothing else."""

    def unavailable_reason(self):
        return None

    def target(self):
        return "tiny"

    def opt_in_reason(self):
        return None

    def unsupported_reason(self, request):
        rows = rows_of(request.block) and request.subtract_mean
        return None if rows and not request.masked and not request.exported else "it is tiny"

    def forward(self, x, residual, scale, bias, *, block, batch, epsilon, subtract_mean):
        assert batch == 1
        assert residual is None
        assert bias is None
        assert subtract_mean
        y, *stats = tiny_forward(x.reshape(block[0], block[3]), scale[None], epsilon)
        return y.reshape(x.shape), None, *stats

    def vjp(self, x, dy, d_residual_sum, scale, mean_high, mean_low, rstd, *, block, batch, wanted):
        assert d_residual_sum is None
        rows = (batch, block[0], block[3])
        dx, dscale = tiny_vjp(x.reshape(rows), dy.reshape(rows), scale, mean_high, rstd)
        return dx.reshape(x.shape), dscale if wanted[0] else None, None


X = np.random.default_rng(0).standard_normal((3, 5, 11), np.float32)
SCALE = np.linspace(1, 2, 11, dtype=np.float32)


def layer_norm(x, scale, **options):
    return jn.layer_norm(x, jn.NormParams(scale), **options)


@pytest.fixture
def table(change):
    """The table as a test makes it."""
    return lambda **entries: change(kernels, "KERNELS", {"cpu": kernels.cpu, **entries})


@pytest.fixture
def no_compiler():
    """The entry of a platform whose kernel could not be built."""
    return types.SimpleNamespace(unavailable_reason=lambda: "no compiler was found")


def lowered(function, platform, *args):
    return jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.usefixtures("kernel")
def test_one_traced_program_runs_by_each_platform_s_kernel(table):
    table(tpu=Tiny())
    traced = jax.jit(layer_norm).trace(X, SCALE)
    text = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "tpu", "cuda")}
    assert ["jaxnorm_forward" in text[p] for p in ("cpu", "tpu", "cuda")] == [True, False, False]
    assert ["tiny_forward" in text[p] for p in ("cpu", "tpu", "cuda")] == [False, True, False]


@pytest.mark.usefixtures("kernel")
def test_support_is_checked_for_each_platform(table):
    table(tpu=Tiny())
    batch_norm = lambda x: jn.batch_norm(x, jn.init_batch_norm_state(11))[0]
    assert "jaxnorm_forward" in lowered(batch_norm, "cpu", X)
    assert "stablehlo.reduce" in lowered(batch_norm, "tpu", X)
    assert "tiny" not in lowered(batch_norm, "tpu", X)


def test_a_kernel_is_reached_where_another_could_not_be_built(table, no_compiler):
    table(cpu=no_compiler, tpu=Tiny())
    assert "tiny_forward" in lowered(layer_norm, "tpu", X, SCALE)
    formula = layer_norm(X, SCALE, epsilon=0.25, implementation="xla")
    np.testing.assert_array_equal(layer_norm(X, SCALE, epsilon=0.25), formula)
    assert jn.implementations()["cpu"] == "xla: no compiler was found"
    assert jn.implementations()["tpu"] == "kernel: tiny"


@pytest.mark.usefixtures("kernel")
def test_a_kernel_with_an_opt_in_reason_is_used_by_name_only(table, monkeypatch):
    tiny = Tiny()
    monkeypatch.setattr(tiny, "opt_in_reason", lambda: "it was never run on a real chip")
    table(tpu=tiny)
    assert "tiny_forward" not in lowered(layer_norm, "tpu", X, SCALE)
    asked = functools.partial(layer_norm, implementation="kernel")
    assert "tiny_forward" in lowered(asked, "tpu", X, SCALE)
    assert jn.implementations()["tpu"] == "xla: it was never run on a real chip"
    monkeypatch.setenv(kernels.VARIABLE, "kernel")  # it is read while a call is traced
    assert "tiny_forward" in lowered(lambda *args: layer_norm(*args), "tpu", X, SCALE)
    assert jn.implementations()["tpu"] == "kernel: tiny"


def test_asking_for_a_kernel_is_an_error_where_it_can_t_run(table, no_compiler):
    asked = functools.partial(layer_norm, implementation="kernel")
    table(cpu=no_compiler, tpu=Tiny())
    assert "tiny_forward" in lowered(asked, "tpu", X, SCALE)
    with pytest.raises(ValueError, match=r"implementation='kernel' must.*no compiler was found"):
        asked(X, SCALE)
    with pytest.raises(ValueError, match=r"implementation='kernel' must.*no kernel for cuda"):
        lowered(asked, "cuda", X, SCALE)
    # No platform supports a mask: the error comes while tracing.
    with pytest.raises(ValueError, match=r"implementation='kernel' must.*no compiler was found"):
        jax.eval_shape(functools.partial(asked, where=X > 0), X, SCALE)
    with pytest.raises(ValueError, match=r"implementation='kernel' must.*it is tiny"):
        export.export(jax.jit(asked), platforms=["tpu"])(X, SCALE)


def test_what_an_entry_computes_is_what_jax_differentiates(table):
    """Values, gradients, and both under vmap, by the tiny kernel on this machine."""
    table(cpu=Tiny())

    def results(implementation):
        def loss(scale, x):
            y = layer_norm(x, scale, implementation=implementation)
            return jnp.sum(jnp.sin(y)), y

        both = jax.grad(loss, (0, 1), has_aux=True)
        program = jax.jit(lambda scale, x: (both(scale, x), jax.vmap(both, (None, 0))(scale, x)))
        return program.lower(SCALE, X).as_text(), program(SCALE, X)

    text, ours = results("kernel")
    assert "tiny_forward" in text
    assert "tiny_vjp" in text
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(results("xla")[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)  # some rounding of numbers near one
