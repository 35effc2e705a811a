"""What the modules add to Flax's, and where linen and nnx differ."""

from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx

import jaxnorm.linen
import jaxnorm.nnx

X = jnp.asarray(np.random.default_rng(0).standard_normal((5, 4, 6)) + 2, jnp.float32)
AXES: Any = (1, 2)  # Flax declares an integer


def linen_batch_norm(x, **arguments):
    """The result and the running mean and variance after one step."""
    module = jaxnorm.linen.BatchNorm(use_running_average=False, **arguments)
    variables = module.init(jax.random.key(0), x)
    y, updates = module.apply(variables, x, mutable=["batch_stats"])
    return y, updates["batch_stats"]["mean"], updates["batch_stats"]["var"]


def nnx_batch_norm(x, num_features=6, **arguments):
    module = jaxnorm.nnx.BatchNorm(num_features, rngs=nnx.Rngs(0), **arguments)
    return module(x), module.mean[...], module.var[...]


@pytest.mark.parametrize("batch_norm", [linen_batch_norm, nnx_batch_norm])
def test_running_mean_of_complex_input_is_complex(batch_norm):
    x = jax.lax.complex(X, X[::-1])
    y, mean, var = batch_norm(x, momentum=0.9)
    right_mean, right_var, _ = oracle.statistics(oracle.wide(x), (0, 1))
    np.testing.assert_allclose(y, oracle.batch_norm(x), atol=2e-6)
    np.testing.assert_allclose(mean, 0.1 * right_mean[0, 0], rtol=1e-6)
    np.testing.assert_allclose(var, 0.9 + 0.1 * right_var[0, 0], rtol=1e-6)
    assert var.dtype == jnp.float32


@pytest.mark.parametrize("batch_norm", [linen_batch_norm, nnx_batch_norm])
def test_momentum_none_needs_the_count_that_modules_do_not_keep(batch_norm):
    with pytest.raises(ValueError, match=r"momentum must .* got None; .*jaxnorm.batch_norm"):
        batch_norm(X, momentum=None)


def test_group_norm_of_a_single_example_without_a_batch_axis():
    for module in (jaxnorm.linen.GroupNorm(2), flax.linen.GroupNorm(2)):
        y = jax.vmap(lambda x, m=module: m.init_with_output(jax.random.key(0), x)[0])(X[0])
        np.testing.assert_allclose(y, oracle.group_norm(X[0], num_groups=2), atol=2e-5)  # Flax's


def test_nnx_group_norm_refuses_other_features_though_it_has_no_parameters():
    module = jaxnorm.nnx.GroupNorm(12, 2, use_scale=False, use_bias=False, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"x must have the 12 features .* \(5, 4, 6\);"):
        module(X)


def test_nnx_batch_norm_over_several_feature_axes():
    y, mean, _ = nnx_batch_norm(X, num_features=24, axis=AXES, momentum=0.0)
    np.testing.assert_allclose(y.reshape(5, 24), oracle.batch_norm(X.reshape(5, 24)), atol=2e-6)
    np.testing.assert_allclose(mean, X.reshape(5, 24).mean(0), rtol=1e-6)
    evaluated = jaxnorm.nnx.BatchNorm(
        24, axis=AXES, use_running_average=True, epsilon=0.0, rngs=nnx.Rngs(0)
    )
    np.testing.assert_allclose(evaluated(X), X)


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_errors_speak_of_the_modules_own_arguments(name):
    module = getattr(jaxnorm.linen, name)
    for argument in ("reduction_axes", "feature_axes"):
        with pytest.raises(ValueError, match=f"{argument} must lie in"):
            module(**{argument: 3}).init(jax.random.key(0), X)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_of_the_result_not_of_what_is_measured(dtype):
    x = X + 1e4
    right = oracle.layer_norm(np.asarray(x))
    linen = jaxnorm.linen.LayerNorm(dtype=dtype)
    ours = {
        "linen": linen.init_with_output(jax.random.key(0), x)[0],
        "nnx": jaxnorm.nnx.LayerNorm(6, dtype=dtype, rngs=nnx.Rngs(0))(x),
    }
    for y in ours.values():
        assert y.dtype == dtype
        # One rounding, to the nearest, of numbers up to three.
        np.testing.assert_allclose(
            y.astype(jnp.float32), right, atol=2 * float(jnp.finfo(dtype).eps)
        )


def test_running_statistics_made_in_half_precision_settle_if_the_input_is_better():
    module = jaxnorm.linen.BatchNorm(
        use_running_average=False, force_float32_reductions=False, param_dtype=jnp.bfloat16
    )
    x = 10 + 10 * jnp.array([[-1.0], [1.0]])
    variables: Any = module.init(jax.random.key(0), x)
    assert variables["batch_stats"]["mean"].dtype == jnp.bfloat16  # as Flax makes it

    @jax.jit
    def step(stats) -> Any:
        return module.apply({**variables, "batch_stats": stats}, x, mutable=["batch_stats"])[1]

    stats = variables["batch_stats"]
    for _ in range(1500):
        stats = step(stats)["batch_stats"]
    np.testing.assert_allclose(stats["mean"], [10], rtol=1e-4)
    np.testing.assert_allclose(stats["var"], [100], rtol=1e-4)
