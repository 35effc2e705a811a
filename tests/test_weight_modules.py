"""Modules that normalize weights: values, training, and bugs of Flax that they avoid."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from chex import assert_trees_all_close, assert_trees_all_equal
from flax import nnx

import jaxnorm as jn
import jaxnorm.linen
import jaxnorm.nnx

KEY = jax.random.key(0)
TOL = 32 * float(np.finfo(np.float32).eps)  # a few roundings of numbers below 8, in another order


class Linen(nn.Module):
    """A dense layer in a wrapper; `call` is for the wrapper."""

    wrapper: Any

    @nn.compact
    def __call__(self, x, **call):
        return self.wrapper(nn.Dense(4))(x, **call)


def data(rng):
    return jnp.asarray(rng.standard_normal((8, 3)), jnp.float32)


def wrapped(norms: Any, name: str, **options) -> Any:
    """An nnx linear layer in a wrapper."""
    layer = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    return getattr(norms, name)(layer, rngs=nnx.Rngs(1), **options)


def copied(module) -> Any:
    return jax.tree.map(jnp.copy, nnx.state(module, nnx.Param))


@pytest.mark.parametrize("options", [{}, {"use_scale": False}, {"variable_filter": None}], ids=str)
def test_linen_weight_norm_is_that_of_flax(options, rng):
    x = data(rng)
    theirs, ours = (Linen(lambda d, n=n: n.WeightNorm(d, **options)) for n in (nn, jaxnorm.linen))
    variables: Any = theirs.init(KEY, x)
    shapes = jax.tree.map(jnp.shape, variables)
    assert jax.tree.map(jnp.shape, ours.init(KEY, x)) == shapes
    variables = jax.tree.map(lambda a: a + 0.5, variables)  # a checkpoint
    assert_trees_all_close(ours.apply(variables, x), theirs.apply(variables, x), atol=TOL)


def test_linen_weight_norm_leaves_the_weights_that_it_wraps(rng):
    x = data(rng)
    norm = Linen(jaxnorm.linen.WeightNorm)
    y, variables = norm.init_with_output(KEY, x)
    plain: Any = Linen(lambda dense: dense).init(KEY, x)["params"]["Dense_0"]
    assert_trees_all_equal(variables["params"]["Dense_0"], plain)
    again, stored = norm.apply(variables, x, mutable=True)
    assert_trees_all_equal(stored, variables)
    kernel = jn.weight_norm(plain["kernel"], jnp.ones(4))
    for result in (y, again):
        assert_trees_all_close(result, x @ kernel, atol=TOL)


def test_linen_spectral_norm_is_that_of_flax_in_training(rng):
    x = data(rng)
    theirs, ours = (Linen(n.SpectralNorm) for n in (nn, jaxnorm.linen))
    variables: Any = theirs.init(KEY, x, update_stats=False)
    assert_trees_all_equal(
        ours.init(KEY, x, update_stats=True)["batch_stats"], variables["batch_stats"]
    )
    variables = {**variables, "params": jax.tree.map(lambda a: a + 0.1, variables["params"])}
    expected = {**variables}
    for _ in range(2):
        y, variables["batch_stats"] = train(ours, variables, x)
        z, expected["batch_stats"] = train(theirs, expected, x)
        assert_trees_all_close(y, z, atol=TOL)
        assert_trees_all_close(variables["batch_stats"], expected["batch_stats"], atol=TOL)


def train(module, variables, x):
    y, updates = module.apply(variables, x, update_stats=True, mutable=["batch_stats"])
    return y, updates["batch_stats"]


@pytest.mark.parametrize("update_stats", [True, False])
def test_linen_spectral_norm_leaves_the_weights_that_it_wraps(update_stats, rng):
    x = data(rng)
    norm = Linen(jaxnorm.linen.SpectralNorm)
    variables: Any = norm.init(KEY, x, update_stats=True)
    plain = Linen(lambda dense: dense).init(KEY, x)["params"]
    assert_trees_all_equal(variables["params"], plain)
    _, stored = norm.apply(variables, x, update_stats=update_stats, mutable=True)
    assert_trees_all_equal(stored["params"], plain)
    same = jax.tree.map(jnp.array_equal, stored["batch_stats"], variables["batch_stats"])
    assert jax.tree.all(same) is not update_stats


@pytest.mark.parametrize("name", ["WeightNorm", "SpectralNorm"])
def test_flax_issue_5576_the_wrapped_weights_are_not_overwritten(name, rng):
    x = data(rng)
    module, theirs = (wrapped(norms, name) for norms in (jaxnorm.nnx, nnx))
    before = copied(module)
    y = module(x)
    assert_trees_all_equal(copied(module), before)
    if name == "SpectralNorm":
        u = module.batch_stats[("kernel", "u")][...]
        assert_trees_all_close(jnp.linalg.norm(u), jnp.float32(1), atol=TOL)
    assert_trees_all_close(y, theirs(x), atol=TOL)


def test_flax_issue_5577_scales_are_parameters_and_train(rng):
    module, x = wrapped(jaxnorm.nnx, "WeightNorm"), data(rng)
    before = copied(module)

    @nnx.jit
    def step(module, x):
        gradients = nnx.grad(lambda module: jnp.sum(jnp.sin(module(x))))(module)
        moved = jax.tree.map(lambda p, g: p - 0.1 * g, nnx.state(module, nnx.Param), gradients)
        nnx.update(module, moved)

    step(module, x)
    after = copied(module)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
    assert len(jax.tree.leaves(moved)) == 3  # kernel, bias and scale
    assert all(jax.tree.leaves(moved))
    # The gradient is orthogonal to v, so that its length grows and is not one.
    lengths = [
        jnp.linalg.norm(tree["layer_instance"]["kernel"][...], axis=0) for tree in (before, after)
    ]
    assert (lengths[1] > lengths[0]).all()


def test_linen_scales_and_kernels_train(rng):
    x, module = data(rng), Linen(jaxnorm.linen.WeightNorm)
    params = module.init(KEY, x)["params"]
    apply: Callable[..., Any] = module.apply
    of_params = lambda params: jnp.sum(jnp.sin(apply({"params": params}, x)))
    gradients = jax.jit(jax.grad(of_params))(params)
    v, g = params["Dense_0"]["kernel"], params["WeightNorm_0"]["Dense_0/kernel/scale"]
    loss = lambda v, g: jnp.sum(jnp.sin(x @ jn.weight_norm(v, g)))
    dv, dg = jax.jit(jax.grad(loss, (0, 1)))(v, g)
    assert_trees_all_close(gradients["Dense_0"]["kernel"], dv, atol=TOL)
    assert_trees_all_close(gradients["WeightNorm_0"]["Dense_0/kernel/scale"], dg, atol=TOL)


def test_evaluation_does_not_iterate(rng):
    x, module = data(rng), wrapped(jaxnorm.nnx, "SpectralNorm", n_steps=3)
    module(x)
    module.eval()
    stats = jax.tree.map(jnp.copy, nnx.state(module, nnx.BatchStat))
    y = module(x)
    assert_trees_all_equal(nnx.state(module, nnx.BatchStat), stats)
    kernel, u = module.layer_instance.kernel[...], module.batch_stats[("kernel", "u")][...]
    sigma = np.linalg.norm(oracle.wide(kernel) @ oracle.wide(u)[0])
    np.testing.assert_allclose(y, x @ kernel / sigma, atol=TOL)
    graph, state = nnx.split(module)
    f = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    assert_trees_all_close(f(state, x), y, atol=TOL)
    # A transformation may not get the module as an argument.
    assert jax.grad(lambda x: module(x).sum())(x).shape == x.shape


@pytest.mark.parametrize("use_gain", [False, True])
@pytest.mark.parametrize("fan_in", [False, True])
def test_standardized_layers(fan_in, use_gain, rng):
    x = jnp.asarray(rng.standard_normal((2, 5, 5, 3)), jnp.float32)
    options: Any = {"fan_in": fan_in, "use_gain": use_gain}
    for linen, ours, theirs, theirs_nnx in (
        (
            jaxnorm.linen.StandardizedDense(4, **options),
            jaxnorm.nnx.StandardizedLinear(3, 4, rngs=nnx.Rngs(0), **options),
            nn.Dense(4),
            nnx.Linear(3, 4, rngs=nnx.Rngs(0)),
        ),
        (
            jaxnorm.linen.StandardizedConv(4, (3, 3), **options),
            jaxnorm.nnx.StandardizedConv(3, 4, (3, 3), rngs=nnx.Rngs(0), **options),
            nn.Conv(4, (3, 3)),
            nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0)),
        ),
    ):
        variables: Any = linen.init(KEY, x)
        params, gain = dict(variables["params"]), None
        if use_gain:
            gain = params["gain"] = jnp.arange(1.0, 5.0)
        bare = {part: params[part] for part in ("kernel", "bias")}
        assert_trees_all_equal(bare, theirs.init(KEY, x)["params"])
        kernel = jn.standardize_weight(params["kernel"], gain, fan_in=fan_in)
        expected = theirs.apply({"params": {**bare, "kernel": kernel}}, x)
        assert_trees_all_close(linen.apply({"params": params}, x), expected, atol=TOL)
        assert_trees_all_equal(ours.kernel[...], theirs_nnx.kernel[...])
        ours.kernel[...] = params["kernel"]
        if use_gain:
            nnx.update(ours, {"gain": gain})
        assert_trees_all_close(ours(x), expected, atol=TOL)
        assert_trees_all_equal(ours.kernel[...], params["kernel"])


def test_errors():
    mask, x = jnp.ones((3, 3, 4)), jnp.ones((2, 5, 3))
    with pytest.raises(ValueError, match=r"mask must be None .* \(3, 3, 4\);"):
        jaxnorm.linen.StandardizedConv(4, (3,), mask=mask).init(KEY, x)
    with pytest.raises(ValueError, match=r"mask must be None .* \(3, 3, 4\);"):
        jaxnorm.nnx.StandardizedConv(3, 4, (3,), mask=mask, rngs=nnx.Rngs(0))
    norm = jaxnorm.linen.SpectralNorm(nn.Conv(4, (3,)), error_on_non_matrix=True)
    with pytest.raises(ValueError, match=r"kernel must be a matrix .* \(3, 3, 4\);"):
        norm.init(KEY, x, update_stats=True)
