"""nnx's transformations of a module: what works with Flax's class works with ours.

The table is made from Flax's own behaviour: what its class refuses is not required of ours.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chex import assert_trees_all_close
from flax import nnx

import jaxnorm
import jaxnorm.nnx as jn

NORMS = ["BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm"]
SHAPE = (2, 4, 5, 6)
# Signs alternate along each axis and one element of five is masked, so wherever statistics are
# shared, at least two fifths have either sign. Magnitudes are 1 to 2: the mean of the squares is at
# most 4.2 times the variance, by which Flax's variance multiplies a rounding. Up to 8 roundings (of
# a sum of 240 elements in pairs) are then multiplied by the largest |x - mean| / deviation, 4, and
# the largest scale, 3.
X = np.random.default_rng(0).uniform(1, 2, SHAPE) * (-1) ** np.indices(SHAPE).sum(0)
X = jnp.asarray(X, jnp.float32)
MASK = jnp.asarray(np.arange(X.size).reshape(SHAPE) % 5 != 0)
TOL = 4.2 * 8 * 4 * 3 * float(np.finfo(np.float32).eps)


def loss(module, x, **named):
    return jnp.sum(jnp.sin(module(x, **named)))


def call(module, x, named):
    return module(x, **named)


def by_name(module, x, named):
    """All arguments by name."""
    name = "inputs" if isinstance(module, nnx.Linear | nnx.Conv) else "x"
    return {name: x, **named}


def axes(named):
    """`in_axes` of x and of the mask, where the module itself is mapped."""
    return 0, 0 if named else None


def method(transform):
    """A layer whose method is transformed."""

    class Layer(nnx.Module):
        def __init__(self, inner):
            self.inner = inner

        @transform
        def __call__(self, x, named):
            return self.inner(x, **named)

    return lambda module, x, named: Layer(module)(x, named)


EXAMPLES: dict[str, Any] = {"in_axes": (None, 0, 0)}
# Each gets the module, x, and {} or the mask by its name. With RMSNorm of Flax all of them work.
CALLS: dict[str, Any] = {
    "call": call,
    "by name": lambda m, x, named: m(**by_name(m, x, named)),
    "jit": lambda m, x, named: nnx.jit(m)(x, **named),
    "jit of the class": lambda m, x, named: nnx.jit(type(m).__call__)(m, x, **named),
    "jit of a function": nnx.jit(call),
    "jit of a method": method(nnx.jit),
    "remat": lambda m, x, named: nnx.remat(m)(x, **named),
    "remat by name": lambda m, x, named: nnx.remat(m)(**by_name(m, x, named)),
    "remat of the class": lambda m, x, named: nnx.remat(type(m).__call__)(m, x, **named),
    "remat of a function": nnx.remat(call),
    "remat of a method": method(nnx.remat),
    "vmap": lambda m, x, named: nnx.vmap(m)(x, **named),
    "vmap by axes": lambda m, x, named: nnx.vmap(m, in_axes=axes(named))(x, **named),
    "vmap of the class": lambda m, x, named: nnx.vmap(
        type(m).__call__, in_axes=(None, *axes(named))
    )(m, x, **named),
    "vmap of a function": nnx.vmap(call, **EXAMPLES),
    "vmap of a method": method(nnx.vmap(**EXAMPLES)),
    "vmap of remat": lambda m, x, named: nnx.vmap(nnx.remat(m))(x, **named),
    "scan": lambda m, x, named: nnx.scan(m, in_axes=0, out_axes=0)(x, **named),
    "scan of a function": nnx.scan(call, **EXAMPLES, out_axes=0),
    "scan that carries": lambda m, x, named: nnx.scan(
        lambda m, x, named: (m, m(x, **named)), in_axes=(nnx.Carry, 0, 0), out_axes=(nnx.Carry, 0)
    )(m, x, named)[1],
    "cond": lambda m, x, named: nnx.cond(True, call, call, m, x, named),
    "eval_shape": lambda m, x, named: jnp.zeros(nnx.eval_shape(m, x, **named).shape),
    "eval_shape of a function": lambda m, x, named: jnp.zeros(
        nnx.eval_shape(call, m, x, named).shape
    ),
    "grad": lambda m, x, named: nnx.grad(lambda m, x: loss(m, x, **named), argnums=1)(m, x),
    "grad of remat": lambda m, x, named: jax.grad(lambda x: loss(nnx.remat(m), x, **named))(x),
    "grad of vmap": lambda m, x, named: nnx.grad(lambda m: loss(nnx.vmap(m), x, **named))(m),
}


def norm(norms, name, training) -> Any:
    """A norm of Flax or ours, with random parameters that are the same for both."""
    arguments: dict[str, Any] = {"num_groups": 2} if name == "GroupNorm" else {}
    arguments["scale_init"] = nnx.initializers.uniform(3.0)
    if name != "RMSNorm":
        arguments["bias_init"] = nnx.initializers.uniform(1.0)
    module = getattr(norms, name)(6, rngs=nnx.Rngs(0), **arguments)
    module.train() if training else module.eval()
    return module


def outcome(how, module, named):
    """The result and the variables after the call, or the error."""
    try:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            y = CALLS[how](module, X, named)
    except Exception as error:  # whatever Flax raises
        return error
    return y, nnx.to_pure_dict(nnx.state(module))


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("how", CALLS)
def test_what_works_with_a_norm_of_flax_works_with_ours(how, name):
    for training in (True, False) if name == "BatchNorm" else (False,):
        for named in ({}, {"mask": MASK}):
            theirs, ours = (outcome(how, norm(norms, name, training), named) for norms in (nnx, jn))
            if isinstance(theirs, Exception):
                assert name != "RMSNorm", theirs  # Flax does all of this
                continue
            assert not isinstance(ours, Exception), (training, [*named], ours)
            # A gradient of scale or bias is a sum over all of x.
            assert_trees_all_close(
                ours, theirs, atol=TOL * (X.size if "grad" in how else 1), rtol=0
            )


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("named", [{}, {"mask": MASK}], ids=["all", "masked"])
def test_every_norm_can_itself_be_transformed(name, named):
    """Flax's RMSNorm can; the others refuse it, because their mask has no position."""
    module = norm(jn, name, training=False)
    each = [module(X[i], **{key: value[i] for key, value in named.items()}) for i in (0, 1)]
    for transform in (nnx.vmap, lambda m: nnx.scan(m, in_axes=0, out_axes=0)):
        assert_trees_all_close(transform(module)(X, **named), jnp.stack(each), atol=TOL, rtol=0)
    assert_trees_all_close(nnx.remat(module)(X, **named), module(X, **named), atol=TOL, rtol=0)


def linear():
    return nnx.Linear(6, 6, rngs=nnx.Rngs(0))


def convolution():
    return nnx.Conv(6, 6, (3,), rngs=nnx.Rngs(0))


def layer(norms, name) -> Any:
    """A layer with normalized weights in evaluation, or Flax's that ours inherits from."""
    if name == "StandardizedConv":
        return convolution() if norms is nnx else jn.StandardizedConv(6, 6, (3,), rngs=nnx.Rngs(0))
    if name == "StandardizedLinear":
        return linear() if norms is nnx else jn.StandardizedLinear(6, 6, rngs=nnx.Rngs(0))
    module = getattr(norms, name)(linear(), rngs=nnx.Rngs(0))
    module.eval()
    return module


def plain(name):
    """Flax's layer, with the weights that ours has."""
    module = convolution() if name == "StandardizedConv" else linear()
    if name.startswith("Standardized"):
        kernel = jaxnorm.standardize_weight(module.kernel[...])
    else:
        kernel = layer(jn, name)(jnp.eye(6))  # the bias is zero
    module.kernel[...] = kernel
    return module


@pytest.mark.parametrize(
    "name", ["WeightNorm", "SpectralNorm", "StandardizedLinear", "StandardizedConv"]
)
@pytest.mark.parametrize("how", [how for how in CALLS if how != "grad of vmap"])  # of weights
@pytest.mark.thorough
def test_what_works_with_a_layer_of_flax_works_with_ours(how, name):
    module = layer(nnx, name)
    theirs = outcome(how, module, {})
    ours = outcome(how, layer(jn, name), {})
    if isinstance(theirs, Exception):
        return
    assert not isinstance(ours, Exception), ours
    expected = outcome(how, plain(name), {})
    assert not isinstance(expected, Exception), expected
    # Six or eighteen products of numbers below 2, a few roundings each.
    assert_trees_all_close(ours[0], expected[0], atol=TOL, rtol=0)


@pytest.mark.parametrize("name", ["AddLayerNorm", "AddRMSNorm"])
def test_norms_of_a_residual_sum_can_be_transformed(name):
    module = getattr(jn, name)(6, rngs=nnx.Rngs(0))
    each = [module(x, 2 * x, mask=mask) for x, mask in zip(X, MASK, strict=True)]
    expected = jax.tree.map(lambda *results: jnp.stack(results), *each)
    for transform in (nnx.vmap, lambda m: nnx.vmap(nnx.remat(m)), nnx.jit):
        results = transform(module)(X, 2 * X, mask=MASK)
        assert_trees_all_close(results, expected, atol=TOL, rtol=0)


@pytest.mark.parametrize(
    "name", ["DynamicErf", "DynamicTanh", "FilterResponseNorm", "GlobalResponseNorm"]
)
def test_norms_that_flax_lacks_can_be_transformed(name):
    module = getattr(jn, name)(6, rngs=nnx.Rngs(0), scale_init=nnx.initializers.uniform(3.0))
    expected = jnp.stack([module(x) for x in X])
    for transform in (nnx.vmap, lambda m: nnx.vmap(nnx.remat(m)), lambda m: nnx.vmap(nnx.jit(m))):
        assert_trees_all_close(transform(module)(X), expected, atol=TOL, rtol=0)


def test_recalibrate_and_audit_of_a_model_that_transforms_the_class():
    class Model(nnx.Module):
        def __init__(self):
            self.norm = jn.BatchNorm(6, momentum=0.9, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return nnx.remat(type(self.norm).__call__)(self.norm, x, mask=MASK)

    model = Model()
    jn.recalibrate(model, [X])
    right = np.mean(X, (0, 1, 2), where=np.asarray(MASK))
    np.testing.assert_allclose(model.norm.mean[...], right, atol=TOL)
    assert not jn.audit(model, X)
