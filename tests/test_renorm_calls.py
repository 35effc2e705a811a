"""Calls of batch renormalization: devices, schedules, modules, errors, and steps beside Keras."""

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from jax import export, lax
from maps import ALL, EVEN, mapped
from renorming import LIMITS, MEAN, VAR, assert_equal, problem, renormed, some, state_of, truth

import jaxnorm as jn
import jaxnorm.linen
import jaxnorm.nnx
from benchmarks.accelerators.collectives import collectives_of


def over_devices(shards, params, groups=None):
    """y and the new state, on one of eight devices."""
    x, where = shards
    return jn.batch_norm(
        x,
        state_of(),
        "data",
        params=params,
        where=where,
        renorm=jn.Renorm(*LIMITS),
        axis_index_groups=groups,
    )


@pytest.mark.parametrize(
    ("how", "groups", "exchanged"),
    [
        # What batch norm exchanges: statistics and counts, then two sums, and those that are the
        # gradients of scale and bias; the XLA of jax 0.12 finds that these are the two sums, too.
        ("checked", ALL, [[("all-gather", 4 * 4, 8), ("all-reduce", n * 4, 8)] for n in (2, 4)]),
        (
            "unchecked",
            EVEN,
            [[("all-gather", 16, 4), ("all-reduce", 2 * 4, 8), ("reduce-scatter", 4 * 2 * 4, 4)]],
        ),
        ("vmap", EVEN, [[]]),
    ],
    ids=["checked", "unchecked-groups", "vmap-groups"],
)
def test_eight_devices_are_as_one_and_exchange_as_little_as_batch_norm(how, groups, exchanged, rng):
    x, scale, bias, weights = problem(rng, shape=(8, 5, 4))
    where, params = some(rng, x.shape), jn.NormParams(scale, bias)
    norm = functools.partial(over_devices, groups=None if groups == ALL else groups)

    def run(x, where, params):
        f = lambda x, params: mapped(how, norm)((x, where), params)
        y, vjp, state = jax.vjp(f, x, params, has_aux=True)
        return y, *vjp(weights), state

    program: Any = jax.jit(run).lower(x, where, params).compile()
    found = collectives_of(program.as_text())
    assert sorted((c.kind, c.numbers, c.devices) for c in found) in exchanged
    y, dx, params, state = jax.device_get(program(x, where, params))
    sums = np.zeros((2, 4))
    for group in map(list, groups):
        args = x[group], scale, bias, weights[group], where[group]
        right = truth(*args)
        assert oracle.units(y[group], right[0]) < 4
        assert oracle.units(dx[group], right[1]) < 8  # a sum of each device, and of these
        sums += right[2:]
        one = jn.batch_norm(x[group], state_of(), where=where[group])[1]
        for stat, expected in zip(state, one, strict=True):
            many = np.broadcast_to(expected, stat[group].shape)
            np.testing.assert_allclose(stat[group], many, rtol=1e-6)
    for gradient, expected in zip(params, sums, strict=True):
        assert oracle.units(gradient, expected) < 16


def test_steps_of_training_beside_keras(rng):
    """Keras averages standard deviations, so before each step it is given ours."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras: Any = pytest.importorskip("keras", reason="Keras is in the extra 'benchmarks'")
    if keras.backend.backend() != "jax":
        pytest.skip("KERAS_BACKEND is not jax")
    epsilon, momentum, rate = 1e-3, 0.8, 0.05
    clipping = {"rmax": LIMITS[0], "rmin": 1 / LIMITS[0], "dmax": LIMITS[1]}
    layer = keras.layers.BatchNormalization(
        renorm=True, renorm_clipping=clipping, epsilon=epsilon, momentum=momentum
    )
    layer.build((16, 4))
    names = [variable.name for variable in layer.non_trainable_variables]

    def theirs(h, params, state):
        std = jnp.sqrt(state.var + epsilon)
        given = {"renorm_mean": state.mean, "moving_mean": state.mean, "renorm_stddev": std}
        stats = [given.get(name, std) for name in names]
        y, stats = layer.stateless_call([*params], stats, h, training=True)
        # What its variance would be without renorm, which averages it as ours does.
        var = momentum * state.var + (1 - momentum) * jnp.var(h, 0)
        return y, jn.BatchNormState(stats[names.index("moving_mean")], var, state.count)

    def ours(h, params, state):
        options: Any = {"epsilon": epsilon, "momentum": momentum}
        return jn.batch_norm(h, state, params=params, renorm=jn.Renorm(*LIMITS), **options)

    def steps(norm, batches, weights, targets):
        def loss(weights, params, state, batch):
            y, state = norm(batch @ weights, params, state)
            return jnp.mean((y - targets) ** 2), (y, state)

        def step(carry, batch):
            weights, params, state = carry
            gradient, (y, state) = jax.grad(loss, (0, 1), has_aux=True)(*carry, batch)
            weights, params = jax.tree.map(lambda a, g: a - rate * g, (weights, params), gradient)
            return (weights, params, state._replace(count=state.count * 0)), (y, gradient)

        return lax.scan(step, (weights, jn.init_params(4), state_of()), batches)

    batches = rng.standard_normal((6, 16, 4)).astype(np.float32) + 1
    weights, targets = (rng.standard_normal(s).astype(np.float32) for s in ((4, 4), (16, 4)))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        a, b = (
            jax.jit(functools.partial(steps, f))(batches, weights, targets) for f in (ours, theirs)
        )
    for result, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        # Some units of numbers up to ten, after six steps.
        np.testing.assert_allclose(result, right, atol=2e-5)


def test_the_limits_may_come_from_a_schedule_in_one_program(rng):
    x = problem(rng)[0]
    step: Any = jax.jit(lambda x, renorm: jn.batch_norm(x, state_of(), renorm=renorm)[0])
    for limits in ((1.0, 0.0), (2.0, 0.25), (3.0, 5.0)):
        right = oracle.batch_renorm(x, (MEAN, VAR), limits)
        assert oracle.units(step(x, jn.Renorm(*limits)), right) < 4
    assert step._cache_size() == 1
    kept = export.deserialize(export.export(step)(x, jn.Renorm(*LIMITS)).serialize())
    right = oracle.batch_renorm(x, (MEAN, VAR), LIMITS)
    assert oracle.units(kept.call(x, jn.Renorm(*map(jnp.float32, LIMITS))), right) < 4


def linen(x, renorm=None, train=True, **attributes):
    """y and the new running statistics of linen's module."""
    module = jaxnorm.linen.BatchNorm(not train, momentum=0.5, **attributes)
    variables = {"params": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}}
    variables["batch_stats"] = dict(zip(("mean", "var"), state_of(), strict=False))
    y, updates = module.apply(variables, x, renorm=renorm, mutable=["batch_stats"])
    return y, updates["batch_stats"]["mean"], updates["batch_stats"]["var"]


def nnx_module(x, renorm=None, train=True, **attributes):
    """The same of nnx's."""
    module = jaxnorm.nnx.BatchNorm(
        4, use_running_average=not train, momentum=0.5, rngs=nnx.Rngs(0), **attributes
    )
    module.mean[...], module.var[...] = state_of()[:2]
    return module(x, renorm=renorm), module.mean[...], module.var[...]


@pytest.mark.parametrize("module", [linen, nnx_module], ids=["linen", "nnx"])
def test_modules_are_the_function(module, rng):
    x = problem(rng)[0]

    def function(renorm, **options):
        y, state = jn.batch_norm(x, state_of(), momentum=0.5, renorm=renorm, **options)
        return y, state.mean, state.var

    renorm = jn.Renorm(*LIMITS)
    assert_equal(module(x, renorm), function(renorm))
    assert_equal(module(x, renorm, train=False), function(None, train=False))
    schedule: Any = jax.jit(lambda x, t: module(x, jn.Renorm(1 + t, t)))
    for t in (0.5, 1.0):
        for result, right in zip(schedule(x, t), function(jn.Renorm(1 + t, t)), strict=True):
            assert oracle.units(result, right) < 2  # the compiler may fuse other operations
    assert schedule._cache_size() == 1


@pytest.mark.parametrize("flavour", ["linen", "nnx"])
def test_a_call_wins_over_the_constructor(flavour, rng):
    x = problem(rng)[0]
    mine, other = jn.Renorm(*LIMITS), jn.Renorm(3.0, 5.0)
    if flavour == "linen":
        module = jaxnorm.linen.BatchNorm(use_running_average=False, renorm=mine)
        variables = module.init(jax.random.key(0), x)
        call = lambda **k: module.apply(variables, x, mutable=["batch_stats"], **k)[0]
    else:
        call = lambda **k: jaxnorm.nnx.BatchNorm(4, renorm=mine, rngs=nnx.Rngs(0))(x, **k)
    state, params = jn.init_batch_norm_state(4), jn.init_params(4)
    for given, wins in ((None, mine), (other, other), (jn.Renorm(1, 0), None)):
        right = jn.batch_norm(x, state, params=params, renorm=wins)[0]
        np.testing.assert_array_equal(call(renorm=given), right)


NAN = float("nan")
TEXT: Any = "3"


@pytest.mark.parametrize(
    ("renorm", "error", "words"),
    [
        ((3.0, 5.0), TypeError, "renorm must be a Renorm or None, got tuple"),
        (jn.Renorm(0.5, 1.0), ValueError, "r_max must be at least 1, got 0.5"),
        (jn.Renorm(NAN, 1.0), ValueError, "r_max must be at least 1, got nan"),
        (jn.Renorm(2.0, -1.0), ValueError, "d_max must be at least 0, got -1.0"),
        (jn.Renorm(2.0, NAN), ValueError, "d_max must be at least 0, got nan"),
        (jn.Renorm(TEXT, 1.0), TypeError, "r_max must be a real number, got str"),
        (jn.Renorm(2.0, jnp.ones(4)), ValueError, "d_max must be a scalar, got shape"),
    ],
    ids=str,
)
def test_says_what_is_wrong(renorm, error, words):
    x = jnp.ones((6, 4))
    for train in (True, False):
        with pytest.raises(error, match=f"^{words}.*; [^\n]*$"):
            jn.batch_norm(x, state_of(), renorm=renorm, train=train)
    for module in (linen, nnx_module):
        with pytest.raises(error, match=words):
            module(x, renorm)


@pytest.mark.parametrize("limit", [np.float32, np.asarray, jnp.float32], ids=["np", "0-d", "jax"])
def test_limits_that_are_arrays_may_be_closed_over(limit, rng):
    x, *_ = problem(rng)
    renorm = jn.Renorm(*map(limit, LIMITS))
    y = jax.jit(lambda x: jn.batch_norm(x, state_of(), renorm=renorm)[0])(x)
    expected, _ = jn.batch_norm(x, state_of(), renorm=jn.Renorm(*LIMITS))
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-6)
    module = jaxnorm.nnx.BatchNorm(4, renorm=renorm, rngs=nnx.Rngs(0))
    assert module.renorm == pytest.approx(LIMITS)


def test_the_kernel_is_refused():
    x, renorm = jnp.ones((6, 4)), jn.Renorm(*LIMITS)
    with pytest.raises(ValueError, match=r"implementation='kernel' .* no kernel does batch renorm"):
        jn.batch_norm(x, state_of(), renorm=renorm, implementation="kernel")


def test_sub_batches_have_corrections_of_their_own(rng):
    x, scale, bias, _ = problem(rng, shape=(6, 3, 4))
    together = renormed(x, scale, bias, virtual_batch_size=2)
    apart = [renormed(part, scale, bias) for part in np.split(x, 3)]
    np.testing.assert_allclose(together, np.concatenate(apart), rtol=0, atol=2e-6)


def test_with_an_offset_and_a_scale_for_each_example(rng):
    x, scale, bias, _ = problem(rng)
    y = renormed(x, scale, bias)
    offset = renormed(x, scale - 0.5, bias, scale_offset=0.5)
    np.testing.assert_allclose(offset, y, rtol=0, atol=2e-6 * np.abs(y).max())
    # The same for all examples, and twice that for the last.
    own = np.tile(scale, (len(x), 1, 1))
    own[-1] *= 2
    of_examples = renormed(x, own, np.zeros(own.shape, np.float32))
    plain = renormed(x, scale, np.zeros_like(bias))
    np.testing.assert_allclose(of_examples[:-1], plain[:-1], rtol=0, atol=1e-6)
    np.testing.assert_allclose(of_examples[-1], 2 * plain[-1], rtol=0, atol=4e-6)


@pytest.mark.parametrize("module", [linen, nnx_module], ids=["linen", "nnx"])
def test_the_kernel_that_the_environment_asks_for_is_refused(module, monkeypatch):
    monkeypatch.setenv("JAXNORM_IMPLEMENTATION", "kernel")
    with pytest.raises(ValueError, match=r"no kernel does batch renorm.*JAXNORM_IMPLEMENTATION"):
        module(jnp.ones((6, 4)), jn.Renorm(*LIMITS))
