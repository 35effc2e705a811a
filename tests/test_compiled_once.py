"""A repeated call compiles nothing."""

import contextlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import monitoring

import jaxnorm as jn
import jaxnorm.linen
import jaxnorm.nnx

KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 5, 6)), jnp.float32)
PARAMS, STATE = jn.init_params(6), jn.init_batch_norm_state(6)
_events: list[str] = []
monitoring.register_event_duration_secs_listener(lambda event, *_, **__: _events.append(event))


def compilations(f) -> int:
    """How many programs a call compiles, or finds in the folder of compiled programs."""
    _events.clear()
    jax.block_until_ready(f())
    return _events.count("/jax/core/compile/backend_compile_duration")


def test_the_counter_counts():
    assert compilations(lambda: jax.jit(lambda x: x + 1)(X)) == 1
    assert compilations(lambda: X) == 0


FUNCTIONS: dict[str, Any] = {
    "layer_norm": lambda x: jn.layer_norm(x, PARAMS),
    "rms_norm": lambda x: jn.rms_norm(x, PARAMS),
    "group_norm": lambda x: jn.group_norm(x, PARAMS, num_groups=2),
    "instance_norm": lambda x: jn.instance_norm(x, PARAMS),
    "batch_norm": lambda x: jn.batch_norm(x, STATE, params=PARAMS)[0],
    "batch_norm in evaluation": lambda x: jn.batch_norm(x, STATE, params=PARAMS, train=False)[0],
    "add_layer_norm": lambda x: jn.add_layer_norm(x, x, PARAMS)[0],
    "masked": lambda x: jn.layer_norm(x, PARAMS, where=X > -1),
    "standardize_weight": lambda x: jn.standardize_weight(x[0]),
    "weight_norm": lambda x: jn.weight_norm(x[0], jnp.ones(x.shape[-1])),
    "unit_norm": jn.unit_norm,
    "dynamic_tanh": lambda x: jn.dynamic_tanh(x, 0.5, PARAMS),
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("jit", [True, False], ids=["jit", "disable_jit"])
def test_functions_and_their_derivatives(name, jit):
    f = FUNCTIONS[name]

    def call():
        with contextlib.nullcontext() if jit else jax.disable_jit():
            y, pullback = jax.vjp(f, X)
            return f(X), pullback(y), jax.jvp(f, (X,), (X,)), jax.vmap(f)(X[None])

    call()
    assert compilations(call) == 0


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm"])
@pytest.mark.parametrize("jit", [True, False], ids=["jit", "disable_jit"])
def test_modules(name, jit):
    options = {"num_groups": 2} if name == "GroupNorm" else {}
    module = getattr(jaxnorm.nnx, name)(6, rngs=nnx.Rngs(0), **options)
    if name == "BatchNorm":
        options = {"use_running_average": False}
    linen = getattr(jaxnorm.linen, name)(**options)
    variables = linen.init(KEY, X)

    def call():
        with contextlib.nullcontext() if jit else jax.disable_jit():
            return module(X), linen.apply(variables, X, mutable=["batch_stats"])

    call()
    assert compilations(call) == 0


class Model(nn.Module):
    """A model with a list of layers, which has no hash."""

    layers: Any

    @nn.compact
    def __call__(self, x, train=True, mask=None, **_):
        for layer in self.layers:
            x = layer(x)
        x = nn.Dropout(0.5, deterministic=not self.has_rng("dropout"))(x)
        return jaxnorm.linen.BatchNorm(momentum=0.9)(x, not train, mask=mask)


def model(share=False):
    dense = nn.Dense(6)
    return Model([dense, dense if share else nn.Dense(6), nn.BatchNorm(False, momentum=0.9)])


VARIABLES = model().init(KEY, X)


def recalibrated(batches=(X, X + 1), **call):
    return jaxnorm.linen.recalibrate(model(), VARIABLES, batches, **call)["batch_stats"]


@pytest.mark.thorough
def test_linen_recalibrate():
    with pytest.raises(TypeError, match="hash"):
        hash(model())
    mask = X[..., :1] > 0
    for call in (
        {},
        {"reduction": "mean"},
        {"train": True},
        {"mask": mask},
        {"rngs": {"dropout": KEY}},
    ):
        recalibrated((X,), **call)
        assert compilations(lambda call=call: recalibrated(**call)) == 0
    other, inverse = 2 * X, ~mask
    assert compilations(lambda: recalibrated((other,), mask=inverse)) == 0


def test_linen_recalibrate_measures_each_call_anew():
    masks = [X[..., :1] > 0, X[..., :1] < 0]
    last = [recalibrated(mask=mask)["BatchNorm_0"]["mean"] for mask in masks]
    assert np.abs(last[0] - last[1]).max() > 0.1
    # NumPy's arrays may change in place, and so they are no key.
    given = np.array(masks[0])
    first = recalibrated(mask=given)
    np.testing.assert_allclose(first["BatchNorm_0"]["mean"], last[0])
    given[...] = masks[1]
    np.testing.assert_allclose(recalibrated(mask=given)["BatchNorm_0"]["mean"], last[1])
    keys = jax.random.split(KEY)
    noisy = [recalibrated(rngs={"dropout": key})["BatchNorm_0"]["mean"] for key in keys]
    assert np.abs(noisy[0] - noisy[1]).max() > 1e-3


def test_models_that_share_a_layer_are_not_those_that_have_two():
    recalibrated()
    shared = model(share=True)
    variables = shared.init(KEY, X)
    assert len(variables["params"]) < len(VARIABLES["params"])
    jaxnorm.linen.recalibrate(shared, variables, [X])
    assert jaxnorm.linen.audit(shared, variables, X).norms


def test_linen_audit():
    names = [*jaxnorm.linen.audit(model(), VARIABLES, X).norms]
    assert len(names) == 2
    other = 2 * X
    assert compilations(lambda: jaxnorm.linen.audit(model(), VARIABLES, other)) == 0
    assert [*jaxnorm.linen.audit(model(), VARIABLES, X).norms] == names


class NnxModel(nnx.Module):
    """The last norm is called first."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.last = jaxnorm.nnx.BatchNorm(6, momentum=0.9, rngs=rngs)
        self.first = nnx.BatchNorm(6, momentum=0.9, rngs=rngs)
        self.dense = nnx.Linear(6, 6, rngs=rngs)

    def __call__(self, x, mask=None, reverse=False):
        norms = (self.last, self.first) if reverse else (self.first, self.last)
        for norm in norms:
            x = norm(self.dense(x), mask=mask)
        return x


def test_nnx_recalibrate_and_audit():
    mask, batches, means = X[..., :1] > 0, [X, X + 1], []
    calls: list[dict[str, Any]] = [{}, {"reduction": "mean"}, {"mask": mask}, {"mask": ~mask}]
    for call in calls:
        jaxnorm.nnx.recalibrate(NnxModel(), [X], **call)
        module = NnxModel()
        recalibrate = lambda m=module, call=call: jaxnorm.nnx.recalibrate(m, batches, **call)
        assert compilations(recalibrate) == 0
        means.append(module.first.mean[...])
    assert np.abs(means[2] - means[3]).max() > 0.1
    for reverse, order in ((False, ["first", "last"]), (True, ["last", "first"])):
        for repeated in (False, True):
            module, found = NnxModel(), []
            audit = lambda m=module, found=found, reverse=reverse: found.append(
                jaxnorm.nnx.audit(m, X, reverse=reverse)
            )
            assert compilations(audit) == 0 or not repeated
            assert [*found[0].norms] == order
