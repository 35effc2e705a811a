"""Equinox's modules and ours, side by side: what the tests of `jaxnorm.equinox` share."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from chex import assert_trees_all_equal_dtypes

eqx: Any = pytest.importorskip("equinox", reason="Equinox is in the extra 'benchmarks'")
jn: Any = pytest.importorskip("jaxnorm.equinox", reason="Equinox is in the extra 'benchmarks'")

MODES = ["batch", "ema"]
BOTH = (eqx.nn, jn)
# Times the largest element: each of the two rounds some ten times, and sums of up to 96 terms.
TOL = 16 * float(np.finfo(np.float32).eps)

both_modes = pytest.mark.parametrize("mode", MODES)


OVER_ALL: Any = {"axis": (1, 2), "epsilon": 1e-5}
TRUTH: dict[str, Any] = {
    "LayerNorm": partial(oracle.layer_norm, **OVER_ALL),
    "RMSNorm": partial(oracle.rms_norm, **OVER_ALL),
    "GroupNorm": partial(oracle.group_norm, num_groups=2, feature_axis=1, epsilon=1e-5),
    "BatchNorm": partial(oracle.batch_norm, feature_axis=1),
}


def filled(tree):
    """The tree with other numbers in its floating-point arrays: no two are alike."""
    rng = np.random.default_rng(1)
    fill = lambda a: jnp.asarray(rng.normal(1, 1, a.shape), a.dtype)
    return jax.tree.map(lambda a: fill(a) if eqx.is_inexact_array(a) else a, tree)


def make(nn, name, **arguments):
    """A module and its state."""
    shape = {"LayerNorm": ((4, 6),), "RMSNorm": ((4, 6),), "GroupNorm": (2, 6)}.get(name, (6, "b"))
    if name == "BatchNorm":
        arguments = {"mode": "batch", "dtype": jnp.float32, **arguments}
    norm, state = eqx.nn.make_with_state(getattr(nn, name))(*shape, **arguments)
    return filled(norm), state


def mapped(norm, name="b"):
    """The norm of a batch: of examples along the first axis, with one state for all."""
    return jax.vmap(norm, in_axes=(0, None), out_axes=(0, None), axis_name=name)


def as_equinox(nn):
    """Equinox's own modules do not work under strict promotion."""
    return jax.numpy_dtype_promotion("standard" if nn is eqx.nn else "strict")


def close(ours, theirs, tol=TOL):
    """Check that the trees differ by rounding alone, leaf by leaf."""
    assert_trees_all_equal_dtypes(ours, theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = oracle.wide(a), oracle.wide(b)
        np.testing.assert_allclose(a, b, rtol=0, atol=tol * max(1.0, np.abs(b).max()))


def errors(name, x, **arguments):
    """Of Equinox and of ours, against the truth: in units of the largest element."""
    plain = {"use_weight": False, "use_bias": False}
    if name in ("GroupNorm", "BatchNorm"):
        plain = {"channelwise_affine": False}
    for nn in BOTH:
        norm, state = make(nn, name, **plain, **arguments)
        with as_equinox(nn):
            y, _ = jax.jit(mapped(norm))(x, state)
        yield oracle.units(y, TRUTH[name](np.asarray(x, np.float64)))
