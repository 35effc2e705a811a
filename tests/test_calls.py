"""A call is one program with a name in profiles, and its types can be exported."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jaxnorm as jn

X, PARAMS = jnp.ones((8, 16)), jn.init_params(16)
STATE = jn.init_batch_norm_state(16)
MOMENTS = jn.moments(X, 0)
batch_norm = functools.partial(jn.batch_norm, X, STATE, params=PARAMS)


@pytest.mark.parametrize(
    "f",
    [
        lambda: jn.layer_norm(X, PARAMS),
        lambda: jn.add_layer_norm(X, X, PARAMS),
        lambda: jn.moments(X, 0),
        lambda: jn.merge_moments(MOMENTS, MOMENTS),
        lambda: jn.update_batch_norm_state(STATE, MOMENTS),
        batch_norm,
        functools.partial(batch_norm, momentum=None, ddof=1),
        functools.partial(batch_norm, train=False),
    ],
    ids=[
        "layer",
        "add-layer",
        "moments",
        "merge",
        "update",
        "batch",
        "batch-cumulative",
        "batch-eval",
    ],
)
def test_it_is_one_program(f):
    """Each operation outside of a program would take as long as the whole norm."""
    assert [eqn.primitive.name for eqn in jax.make_jaxpr(f)().eqns] == ["jit"]


def exported(f, *args):
    return export.deserialize(export.export(jax.jit(f))(*args).serialize()).call(*args)


def test_an_exported_function_may_take_and_return_the_package_s_types():
    def step(x, params, state):
        y, state = jn.batch_norm(x, state, params=params)
        return y, params, state, jn.moments(x, 0)

    x = X + jnp.arange(8.0)[:, None]
    ours = exported(step, x, PARAMS, STATE)
    assert [type(part) for part in ours[1:]] == [jn.NormParams, jn.BatchNormState, jn.Moments]
    expected = step(x, PARAMS, STATE)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)  # the kernel computes one of them


@pytest.mark.parametrize("implementation", ["xla", None])
@pytest.mark.parametrize(
    ("name", "f"),
    [
        ("layer_norm", jn.layer_norm),
        ("rms_norm", jn.rms_norm),
        ("add_layer_norm", lambda x, **how: jn.add_layer_norm(x, x, **how)),
        ("group_norm", functools.partial(jn.group_norm, num_groups=4)),
        ("instance_norm", lambda x, **how: jn.instance_norm(x[None], **how)),
        ("batch_norm", lambda x, **how: jn.batch_norm(x, STATE, **how)[0]),
        ("batch_norm", lambda x, **_: jn.batch_norm(x, STATE, train=False)[0]),
        ("moments", lambda x, **_: jn.moments(x, 0)),
    ],
)
def test_profiles_name_the_function(name, f, implementation):
    f = functools.partial(f, implementation=implementation)
    text = jax.jit(f).lower(X).compile().as_text() or ""
    names = [
        line.split('op_name="')[1].split('"')[0] for line in text.splitlines() if "op_name" in line
    ]
    assert any(f"/{name}/" in op for op in names), names
