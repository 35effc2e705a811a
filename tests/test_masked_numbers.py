"""Masked elements may be any number, NaN too: no gradient depends on them.

The loss leaves these positions out. So all gradients are those of x with any other numbers there.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chex import assert_trees_all_close

import jaxnorm as jn

SHAPE = (4, 6, 5, 8)
STATE = jn.init_batch_norm_state(8)


def batch(**options):
    norm = functools.partial(jn.batch_norm, state=STATE, **options)
    return lambda x, where, params: norm(x, params=params, where=where)[0]


def over_names(x, where, params):
    """Batch norm whose examples are those of a `vmap`."""
    norm = lambda x, where: jn.batch_norm(x, STATE, "i", params=params, where=where)[0]
    return jax.vmap(norm, axis_name="i")(x, where)


def over_devices(x, where, params):
    mesh = jax.make_mesh((2,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    norm = lambda x, where: jn.batch_norm(x, STATE, "i", params=params, where=where)[0]
    data = jax.P("i")
    return jax.shard_map(norm, mesh=mesh, in_specs=(data, data), out_specs=data)(x, where)


FUNCTIONS = {
    "batch": batch(),
    "evaluation": batch(train=False),
    "ghost": batch(virtual_batch_size=2),
    "renorm": batch(renorm=jn.Renorm(2.0, 1.0)),
    "vmap": over_names,
    "shard_map": over_devices,
    "layer": lambda x, where, params: jn.layer_norm(x, params, where=where),
    "rms": lambda x, where, params: jn.rms_norm(x, params, where=where),
    "group": lambda x, where, params: jn.group_norm(x, params, num_groups=2, where=where),
    "instance": lambda x, where, params: jn.instance_norm(x, params, where=where),
    "add": lambda x, where, params: jn.add_layer_norm(x, x, params, where=where)[0],
    "unit": lambda x, where, params: jn.unit_norm(x, where=where),
    "moments": lambda x, where, params: jn.moments(x, (0, 1, 2), where=where)[:2],
}


# The last is finite, and its standardized square is not.
THOROUGH = [pytest.param(number, marks=pytest.mark.thorough) for number in (np.inf, 1e38)]


@pytest.mark.parametrize("number", [np.nan, *THOROUGH], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_are_those_of_any_number(name, number, rng):
    x = rng.normal(size=SHAPE).astype(np.float32)
    where = jnp.asarray(rng.random((*SHAPE[:-1], 1)) < 0.7).at[0, 0, 0].set(False)
    params = jn.NormParams(*rng.normal(size=(2, 8)).astype(np.float32))

    def loss(x, params):
        results = jax.tree.leaves(FUNCTIONS[name](x, where, params))
        left_out = lambda y: jnp.where(where, y, 0) if y.shape == SHAPE else y
        return sum(jnp.sum(jnp.sin(left_out(y))) for y in results)

    first = jax.grad(loss, (0, 1))
    second = jax.grad(lambda *args: sum(map(jnp.vdot, *[jax.tree.leaves(first(*args))] * 2)))
    gradients = jax.jit(lambda *args: (first(*args), second(*args)))
    expected, found = gradients(x, params), gradients(jnp.where(where, x, number), params)
    for of_x in (0, 1):
        dx = found[0][0] if of_x == 0 else found[1]
        assert not np.where(where, 0, dx).any()
    # The same numbers, but XLA may fuse two programs differently.
    assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)
