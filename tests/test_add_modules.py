"""Modules with a residual, compared with those without: variables, values, dtypes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx

import jaxnorm as jn
import jaxnorm.linen
import jaxnorm.nnx

NAMES = pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
FLAVOURS = pytest.mark.parametrize("flavour", [jaxnorm.linen, jaxnorm.nnx], ids=["linen", "nnx"])
X, STREAM = np.random.default_rng(0).standard_normal((2, 4, 5, 6), np.float32)


def ramp(key, shape, dtype=jnp.float32):
    """An initializer of distinct numbers."""
    return jnp.linspace(-1, 3, int(np.prod(shape))).reshape(shape).astype(dtype)


def variables_of(flavour, name, *args, **arguments) -> Any:
    """Plain arrays by name, and a function of them and of the arguments of a call."""
    arguments = {"scale_init": ramp, **arguments}
    if flavour is jaxnorm.linen:
        module = getattr(flavour, name)(**arguments)
        return module.init(jax.random.key(0), *args).get("params", {}), (
            lambda params, *args, **named: module.apply({"params": params}, *args, **named)
        )
    graph, state = nnx.split(getattr(flavour, name)(6, rngs=nnx.Rngs(0), **arguments))

    def call(params, *args, **named):
        new = jax.tree.map(lambda a: a, state)
        nnx.replace_by_pure_dict(new, params)
        return nnx.merge(graph, new)(*args, **named)

    return nnx.to_pure_dict(state), call


@NAMES
@FLAVOURS
def test_variables_are_those_of_the_norm_without_a_residual(flavour, name):
    """So what was stored of one can be loaded by the other, and gives the norm of the sum."""
    stored, norm = variables_of(flavour, name, X)
    own, add = variables_of(flavour, f"Add{name}", X, STREAM)
    assert jax.tree.structure(own) == jax.tree.structure(stored)
    jax.tree.map(np.testing.assert_array_equal, own, stored)
    y, total = add(stored, X, STREAM)
    np.testing.assert_array_equal(total, X + STREAM)
    # A few roundings of y < 8.
    np.testing.assert_allclose(y, norm(stored, X + STREAM), rtol=0, atol=4e-6)
    assert issubclass(getattr(flavour, f"Add{name}"), getattr(flavour, name))


@NAMES
@FLAVOURS
def test_gradients_are_those_of_the_function(flavour, name):
    params, add = variables_of(flavour, f"Add{name}", X, STREAM)
    function = {"LayerNorm": jn.add_layer_norm, "RMSNorm": jn.add_rms_norm}[name]

    def loss(f):
        def value(params, x, stream):
            y, total = f(params, x, stream)
            return jnp.sum(jnp.sin(y) + total**2)

        return jax.grad(value, (0, 1, 2))(params, X, STREAM)

    by_function = lambda params, x, stream: function(x, stream, jn.NormParams(**params))
    jax.tree.map(np.testing.assert_array_equal, loss(add), loss(by_function))


@NAMES
@FLAVOURS
def test_a_mask_is_a_where(flavour, name):
    params, add = variables_of(flavour, f"Add{name}", X, STREAM)
    mask = X > -0.5
    y, _ = add(params, X, STREAM, mask=mask)
    truth = getattr(oracle, {"LayerNorm": "layer_norm", "RMSNorm": "rms_norm"}[name])
    right = truth(X + STREAM, params["scale"], params.get("bias"), where=mask)
    # A few roundings of y, which is larger where it is masked.
    np.testing.assert_allclose(y, right, rtol=0, atol=1e-5)


@NAMES
@FLAVOURS
def test_dtypes(flavour, name):
    """y has the dtype of the module, or that which Flax makes of x and params; the total x's."""
    half = jnp.asarray(X, jnp.bfloat16)
    for arguments, x, expected in (
        ({"dtype": jnp.bfloat16}, X, (jnp.bfloat16, jnp.float32)),
        ({"dtype": jnp.bfloat16}, half, (jnp.bfloat16, jnp.bfloat16)),
        ({}, half, (jnp.float32, jnp.bfloat16)),
        ({}, np.ones(X.shape, np.int32), (jnp.float32, jnp.float32)),
    ):
        params, add = variables_of(flavour, f"Add{name}", x, x, **arguments)
        y, total = add(params, x, x)
        assert (y.dtype, total.dtype) == expected
        np.testing.assert_array_equal(total, (x + x).astype(total.dtype))


@NAMES
@FLAVOURS
def test_a_residual_of_another_dtype_is_an_error(flavour, name):
    params, add = variables_of(flavour, f"Add{name}", X, STREAM)
    with pytest.raises(TypeError, match=r"residual must have the dtype of x, float32.*float16;"):
        add(params, X, STREAM.astype(np.float16))


@pytest.mark.parametrize("name", ["AddLayerNorm", "AddRMSNorm"])
def test_nnx_under_its_own_transforms(name):
    module = getattr(jaxnorm.nnx, name)(6, rngs=nnx.Rngs(0))
    loss = lambda module, x, stream: jnp.sum(jnp.sin(module(x, stream)[0]))
    gradient = nnx.jit(nnx.grad(loss))(module, X, STREAM)
    assert jax.tree.leaves(gradient)[0].shape == (6,)
    y = nnx.vmap(lambda module, *args: module(*args)[0], in_axes=(None, 0, 0))(module, X, STREAM)
    # A few roundings of y < 4.
    np.testing.assert_allclose(y, module(X, STREAM)[0], rtol=0, atol=2e-6)
