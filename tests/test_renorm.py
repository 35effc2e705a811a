"""Batch renormalization: the paper's numbers, and no gradient through r and d."""

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
from transformations import (
    SHAPE,
    assert_same,
    forward_over_reverse,
    jvp,
    reverse_over_reverse,
    vmap_of_grad,
)

import jaxnorm as jn
import jaxnorm.linen
import jaxnorm.nnx
from benchmarks.collectives import collectives_of

LIMITS = (1.5, 0.5)
FLOAT64: Any = np.float64
# For x of mean and variance one: both corrections are clipped from above, from below, and not.
MEAN, VAR = np.array([0.0, 0.9, 1.2, 6.0]), np.array([0.1, 0.9, 9.0, 1.1])


def state_of(dtype=jnp.float32, shift=0.0):
    return jn.BatchNormState(
        jnp.asarray(MEAN + shift, dtype), jnp.asarray(VAR, dtype), jnp.int32(3)
    )


def renormed(x, scale=None, bias=None, where=None, state=None, limits=LIMITS, **options):
    """y alone."""
    params, state = jn.NormParams(scale, bias), state_of() if state is None else state
    renorm = jn.Renorm(*limits)
    return jn.batch_norm(x, state, params=params, where=where, renorm=renorm, **options)[0]


def problem(rng, dtype: Any = np.float32, shape=SHAPE) -> tuple[Any, ...]:
    """x, scale and bias, and the cotangent of y."""
    draw = lambda shape: rng.standard_normal(shape).astype(dtype)
    return draw(shape) + dtype(1), 1 + draw(shape[-1:]), draw(shape[-1:]), draw(shape)


def some(rng, shape=SHAPE):
    """A mask, under which the third feature counts nowhere."""
    return (rng.random(shape) < 0.7) & (np.arange(shape[-1]) != 2)


def truth(x, scale, bias, dy, where=None, state=None, limits=LIMITS, epsilon=1e-5):
    """y and the gradients of x, scale and bias; the features come last."""
    running = (MEAN, VAR) if state is None else state[:2]
    axes = tuple(range(x.ndim - 1))
    r, d = oracle.corrections(x, axes, running, limits, epsilon, where)
    h, dy = oracle.standardized(x, axes, epsilon, where)[0], oracle.wide(dy)
    y = oracle.batch_renorm(x, running, limits, scale, bias, epsilon=epsilon, where=where)
    dx = oracle.gradient(x, dy * oracle.wide(scale) * r, axes, epsilon, where)
    return y, dx, (dy * (h * r + d)).sum(axes), dy.sum(axes)


@jax.jit
def value_and_gradients(x, scale, bias, dy, where, state, limits):
    y, vjp = jax.vjp(
        lambda x, *p: renormed(x, *p, where=where, state=state, limits=limits), x, scale, bias
    )
    return y, *vjp(dy)


@pytest.mark.parametrize(("shift", "masked"), [(0, True), (1e4, False)])
def test_values_and_gradients_in_float32(shift, masked, rng):
    x, scale, bias, dy = problem(rng, shape=(8, 25, 4))
    x, state, where = x + np.float32(shift), state_of(shift=shift), some(rng, x.shape)
    where = where if masked else None
    results = value_and_gradients(x, scale, bias, dy, where, state, LIMITS)
    right = truth(x, scale, bias, dy, where, state)
    # Rounding of mean, rstd, r, d and the formula; sums of 200 terms add sqrt(200) more at most.
    for result, expected, units in zip(results, right, (4, 4, 16, 16), strict=True):
        assert oracle.units(result, expected) < units


@pytest.mark.usefixtures("x64", "unoptimized")
def test_values_and_gradients_in_float64(rng):
    x, scale, bias, dy = problem(rng, np.float64)
    results = value_and_gradients(x, scale, bias, dy, None, state_of(jnp.float64), LIMITS)
    for result, expected in zip(results, truth(x, scale, bias, dy), strict=True):
        assert oracle.units(result, expected, FLOAT64) < 16  # both round


def test_the_data_meet_every_clip(rng):
    r, d = oracle.corrections(problem(rng)[0], (0, 1), (MEAN, VAR), LIMITS, 1e-5)
    for correction, limits in ((r, (2 / 3, 1.5)), (d, (-0.5, 0.5))):
        assert {*limits} <= {*correction.flat}
        assert not {*correction.flat} <= {*limits}


def plain(x, scale, bias, where, limits, epsilon):
    """The textbook's formula, for JAX to differentiate in float64."""
    n = jnp.sum(where, (0, 1), keepdims=True).astype(x.dtype)
    mean = jnp.sum(x, (0, 1), where=where, keepdims=True) / n
    var = jnp.sum((x - mean) ** 2, (0, 1), where=where, keepdims=True) / n
    along = lambda a: jnp.asarray(a).reshape(1, 1, -1)
    std, own = jnp.sqrt(along(VAR) + epsilon), jnp.sqrt(var + epsilon)
    r = lax.stop_gradient(jnp.clip(own / std, 1 / limits[0], limits[0]))
    d = lax.stop_gradient(jnp.clip((mean - along(MEAN)) / std, -limits[1], limits[1]))
    y = (x - mean) / own * r + d
    y = y if scale is None else y * along(scale)
    return y if bias is None else y + along(bias)


@pytest.mark.usefixtures("x64", "unoptimized")
@pytest.mark.parametrize(
    "transformation",
    [jvp, vmap_of_grad, forward_over_reverse, reverse_over_reverse],
    ids=lambda t: t.__name__,
)
def test_no_derivative_goes_through_the_corrections(transformation, rng):
    args = tuple(map(jnp.asarray, problem(rng, np.float64)[:3]))
    where, state = jnp.asarray(rng.random(SHAPE) < 0.7).at[0].set(True), state_of(jnp.float64)

    def ours(*args, limits, epsilon):
        return renormed(*args, where=where, state=state, limits=limits, epsilon=epsilon)

    def run(f):
        function = lambda args, limits: transformation(
            functools.partial(f, limits=limits, epsilon=0.01), args
        )
        return jax.jit(function)(args, LIMITS)

    assert_same(run(ours), run(functools.partial(plain, where=where)))


def test_neither_the_state_nor_the_limits_have_a_gradient_by_y(rng):
    x = problem(rng)[0]
    f = lambda mean, var, limits: jnp.sum(
        jnp.sin(renormed(x, state=jn.BatchNormState(mean, var, jnp.int32(0)), limits=limits))
    )
    gradients = jax.grad(f, (0, 1, 2))(*state_of()[:2], tuple(map(jnp.float32, LIMITS)))
    assert not any(np.any(g) for g in jax.tree.leaves(gradients))


@pytest.mark.usefixtures("x64", "unoptimized")
def test_derivatives_of_the_new_state_are_those_of_batch_norm(rng):
    x, _, _, dx = problem(rng, np.float64)

    def moved(x, renorm):
        y, state = jn.batch_norm(x, state_of(jnp.float64), renorm=renorm)
        return state.mean, state.var, jnp.sum(jnp.sin(y))

    of = lambda renorm: jax.jit(lambda x, dx: jax.jvp(lambda x: moved(x, renorm), (x,), (dx,)))
    ours, right = of(jn.Renorm(*LIMITS))(x, dx), of(None)(x, dx)
    assert_same([part[:2] for part in ours], [part[:2] for part in right])
    assert abs(ours[1][2] - right[1][2]) > 0.1  # of y they are others


def test_without_limits_it_is_evaluation(rng):
    x, scale, bias, _ = problem(rng)
    y = renormed(x, scale, bias, limits=(jnp.inf, jnp.inf))
    right = jn.batch_norm(x, state_of(), params=jn.NormParams(scale, bias), train=False)[0]
    np.testing.assert_allclose(y, right, atol=8e-6)  # h r + d rounds numbers up to 20


def both(x, scale, bias, dy, where=None, renorm=None, implementation=None):
    """y and the new state, and the gradients of x and the parameters."""

    def norm(x, params):
        return jn.batch_norm(
            x, state_of(), params=params, where=where, renorm=renorm, implementation=implementation
        )

    y, vjp, state = jax.vjp(norm, x, jn.NormParams(scale, bias), has_aux=True)
    return (y, state), vjp(dy)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("numbers", [(1, 0), (1.0, 0.0), (np.float32(1), -0.0)])
def test_the_numbers_one_and_zero_are_batch_norm_to_the_bit(numbers, rng):
    args = problem(rng)
    assert_equal(both(*args, renorm=jn.Renorm(*numbers)), both(*args, renorm=None))
    renorms = (jn.Renorm(*numbers), None)
    programs = [str(jax.make_jaxpr(functools.partial(both, renorm=r))(*args)) for r in renorms]
    assert programs[0] == programs[1]  # the same primitives, so the kernel is used if there is one


@pytest.mark.parametrize(
    ("dtype", "affine", "masked"),
    [(jnp.float32, True, False), (jnp.bfloat16, False, True)],
    ids=["float32", "bfloat16"],
)
def test_one_and_zero_traced_are_batch_norm_by_xla_to_the_bit(dtype, affine, masked, rng):
    x, scale, bias, dy = problem(rng, shape=(16, 25, 4))
    x, dy, where = jnp.asarray(x, dtype), jnp.asarray(dy, dtype), some(rng, x.shape)
    args = x, *((scale, bias) if affine else (None, None)), dy, where if masked else None
    one, zero = jnp.float32(1), jnp.float32(0)
    ours = jax.jit(both)(*args, jn.Renorm(one, zero))
    right = jax.jit(functools.partial(both, implementation="xla", renorm=None))(*args)
    assert_equal(ours, right)


def test_where_nothing_counts_there_is_the_bias_and_the_state_stays(rng):
    x, scale, bias, _ = problem(rng)
    params, renorm = jn.NormParams(scale, bias), jn.Renorm(*LIMITS)
    y, state = jn.batch_norm(
        x, state_of(), params=params, where=np.zeros((8, 1, 1), bool), renorm=renorm
    )
    np.testing.assert_array_equal(y, np.broadcast_to(bias, SHAPE))
    assert_equal(state, state_of())


def test_a_variance_of_zero_without_epsilon_gives_finite_numbers():
    x = jnp.array([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 3.0, 3.0]])
    zero = jn.BatchNormState(jnp.array([1.0, 0.0, 2.0, 0.0]), jnp.zeros(4), jnp.int32(0))
    y = renormed(x, state=zero, epsilon=0.0)
    # r is at its limit where the batch has a variance, and so is d where the means differ.
    np.testing.assert_array_equal(y, [[0, 0.5, -1.5, -1.0], [0, 0.5, 1.5, 2.0]])


@pytest.mark.parametrize("axes", [1, (-1, 1)], ids=str)
def test_any_feature_axes(axes, rng):
    x = rng.standard_normal((6, 2, 5, 2)).astype(np.float32)
    shape = tuple(x.shape[axis] for axis in sorted(np.atleast_1d(axes) % 4))
    running = MEAN[: np.prod(shape)].reshape(shape), VAR[: np.prod(shape)].reshape(shape)
    mean, var = (jnp.asarray(a, jnp.float32) for a in running)
    state = jn.BatchNormState(mean, var, jnp.int32(0))
    y = renormed(x, state=state, feature_axis=axes)
    right = oracle.batch_renorm(x, running, LIMITS, feature_axis=axes)
    assert oracle.units(y, right) < 4


def test_complex_input(rng):
    parts = rng.standard_normal((2, *SHAPE)).astype(np.float32)
    x, mean = parts[0] + 1j * parts[1], np.array([0.2, -1j, 3 + 4j, 0.1 - 0.2j])
    state = jn.BatchNormState(jnp.asarray(mean, jnp.complex64), state_of().var, jnp.int32(0))
    y = renormed(x, state=state)
    assert oracle.units(y, oracle.batch_renorm(x, (mean, VAR), LIMITS)) < 4


@pytest.mark.usefixtures("x64")
def test_a_state_in_float64_may_have_parts_of_two_precisions(rng):
    x = problem(rng)[0]
    for kinds in ((jnp.float64, jnp.float32), (jnp.float32, jnp.float64)):
        mean, var = (jnp.asarray(a, kind) for a, kind in zip((MEAN, VAR), kinds, strict=True))
        y = renormed(x, state=jn.BatchNormState(mean, var, jnp.int32(0)))
        assert oracle.units(y, oracle.batch_renorm(x, (MEAN, VAR), LIMITS)) < 4


def test_bfloat16_is_rounded_once_and_alone_is_kept(rng):
    x, scale, bias, dy = problem(rng, shape=(8, 25, 4))
    x, dy = jnp.asarray(x, jnp.bfloat16), jnp.asarray(dy, jnp.bfloat16)
    y, backward = jax.vjp(renormed, x, scale, bias)
    kept = [leaf for leaf in jax.tree.leaves(backward) if leaf.size >= x.size]
    assert [(leaf.shape, leaf.dtype) for leaf in kept] == [(x.shape, x.dtype)]
    assert y.dtype == jnp.bfloat16
    right = truth(x, scale, bias, dy)
    # JAX adds up the gradients of each use of x in bfloat16.
    for result, expected, casts in zip((y, backward(dy)[0]), right[:2], (1, 3), strict=True):
        rounding = 0.51 * casts * float(jnp.finfo(jnp.bfloat16).eps)
        error = np.abs(oracle.wide(result) - expected).max()
        assert error <= rounding * np.abs(expected).max()


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
        # gradients of scale and bias.
        ("checked", ALL, [("all-gather", 4 * 4, 8), ("all-reduce", 4 * 4, 8)]),
        (
            "unchecked",
            EVEN,
            [("all-gather", 16, 4), ("all-reduce", 2 * 4, 8), ("reduce-scatter", 4 * 2 * 4, 4)],
        ),
        ("vmap", EVEN, []),
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
    assert sorted((c.kind, c.numbers, c.devices) for c in found) == exchanged
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


def test_says_what_does_not_go_together():
    x, renorm = jnp.ones((6, 4)), jn.Renorm(*LIMITS)
    options: list[tuple[Any, str]] = [
        ({"virtual_batch_size": 3}, "renorm must be given without virtual_batch_size.*; .*noise"),
        ({"implementation": "kernel"}, "implementation='kernel' .* no kernel does batch renorm"),
    ]
    for option, words in options:
        with pytest.raises(ValueError, match=words):
            jn.batch_norm(x, state_of(), renorm=renorm, **option)
    jn.batch_norm(x, state_of(), renorm=jn.Renorm(1, 0), virtual_batch_size=3)


@pytest.mark.parametrize("module", [linen, nnx_module], ids=["linen", "nnx"])
def test_the_kernel_that_the_environment_asks_for_is_refused(module, monkeypatch):
    monkeypatch.setenv("JAXNORM_IMPLEMENTATION", "kernel")
    with pytest.raises(ValueError, match=r"no kernel does batch renorm.*JAXNORM_IMPLEMENTATION"):
        module(jnp.ones((6, 4)), jn.Renorm(*LIMITS))
