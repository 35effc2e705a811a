"""Batch norm over eight devices: under each map that binds a name, with masks and groups."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import jaxnorm as jn
from jaxnorm.core.arithmetic import promote

SHAPE = (8, 5, 6)  # devices, examples of each, features
DATA, SAME = jax.P("data"), jax.P()
BOTH = ("data", "model")
ALL = (tuple(range(8)),)
EVEN = ((0, 3, 4, 5), (1, 2, 6, 7))
UNEVEN = ((0,), (1, 2, 6, 7, 3, 4, 5))
EPSILON = 1e-5
# Times the largest element: the roundings of some ten operations, and of sums of 40 terms.
TOL = 32 * float(np.finfo(np.float32).eps)

# The first two are shard_map, with check_vma and without.
every_map = pytest.mark.parametrize("how", ["checked", "unchecked", "pmap", "vmap"])
either_check = pytest.mark.parametrize("how", ["checked", "unchecked"])
masked_or_not = pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
even_and_uneven = pytest.mark.parametrize("groups", [EVEN, UNEVEN], ids=["even", "uneven"])


def mapped(how, f):
    """f(shards, params) on eight devices: shards have one in each row, and so has the result."""
    if how in ("pmap", "vmap"):
        return getattr(jax, how)(f, axis_name="data", in_axes=(0, None))

    def block(shards, params):
        result = f(jax.tree.map(lambda a: a[0], shards), params)
        return jax.tree.map(lambda a: a[None], result)

    return shard_map(how, block, (DATA, SAME), DATA, data=8)


def shard_map(how, f, in_specs, out_specs, **sizes):
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * len(sizes))
    return jax.shard_map(
        f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=how == "checked"
    )


def initial(features, dtype=jnp.float32):
    """Some state, the same for all features."""
    mean = jnp.full(features, -1, dtype)
    return jn.BatchNormState(mean, jnp.full_like(mean.real, 3), jnp.int32(3))


def normalized(shards, params, axis_name: Any = "data", groups=None):
    """y and the new state."""
    x, where = shards
    state = initial(x.shape[-1], promote(x.dtype, jnp.float32))
    options = {"momentum": 0.5, "epsilon": EPSILON, "axis_index_groups": groups}
    return jn.batch_norm(x, state, axis_name, params=params, where=where, **options)
