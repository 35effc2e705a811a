"""Drop-ins for Flax: signatures, variables, dtypes, checkpoints."""

import functools
import inspect
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chex import assert_trees_all_close, assert_trees_all_equal, assert_trees_all_equal_dtypes
from flax import nnx

import jaxnorm
import jaxnorm.linen
import jaxnorm.nnx

NAMES = ["BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm"]
LINEN: tuple[Any, Any] = (nn, jaxnorm.linen)
NNX: tuple[Any, Any] = (nnx, jaxnorm.nnx)
SHAPE = (4, 3, 5, 6)
# Flax's variance, E[x^2] - E[x]^2, multiplies a rounding by 1 + mean^2 / var, below four here;
# it is then multiplied by the largest |x|, 4, and the largest scale, 3.
TOL = 4 * 4 * 3 * float(np.finfo(np.float32).eps)

both_flavours = pytest.mark.parametrize("flavour", [LINEN, NNX], ids=["linen", "nnx"])
all_norms = pytest.mark.parametrize("name", NAMES)


def build(norms, name, shape=SHAPE, **arguments):
    """A module with what it needs to work on x of the shape, beside the given arguments."""
    if name == "GroupNorm" and "group_size" not in arguments:
        arguments = {"num_groups": 2, **arguments}
    if norms in LINEN:
        mode = {"use_running_average": False} if name == "BatchNorm" else {}
        return getattr(norms, name)(**mode, **arguments)
    axes = np.atleast_1d(arguments.get("feature_axes", arguments.get("axis", -1)))
    features = math.prod(shape[axis] for axis in axes)
    return getattr(norms, name)(features, rngs=nnx.Rngs(0), **arguments)


def ramp(start, stop):
    """An initializer of distinct numbers."""

    def init(key, shape, dtype=jnp.float32):
        return jnp.linspace(start, stop, math.prod(shape)).reshape(shape).astype(dtype)

    return init


RAMPS = (ramp(-1, 3), ramp(2, 1))


def evaluate(norms, name, x, mask=None, initializers=RAMPS, **arguments):
    """The output, and the variables before and after, as plain arrays."""
    for parameter, init in zip(("scale", "bias"), initializers, strict=True):
        if (name, parameter) != ("RMSNorm", "bias"):
            arguments[f"{parameter}_init"] = init
    # Flax's own modules do not work under strict promotion.
    ours = norms in (jaxnorm.linen, jaxnorm.nnx)
    with jax.numpy_dtype_promotion("strict" if ours else "standard"):
        module = build(norms, name, x.shape, **arguments)
        if norms in LINEN:
            before = module.init(jax.random.key(0), x, mask=mask)
            y, after = module.apply(before, x, mask=mask, mutable=True)
            return y, before, after
        before = nnx.to_pure_dict(nnx.state(module))
        return module(x, mask=mask), before, nnx.to_pure_dict(nnx.state(module))


def compare(flavour, name, x, mask=None, **arguments):
    """Check that ours agrees with Flax's on well-conditioned data."""
    theirs, ours = (
        jax.jit(functools.partial(evaluate, norms, name, **arguments))(x, mask) for norms in flavour
    )
    assert_trees_all_equal(ours[1], theirs[1], strict=True)
    assert_trees_all_equal_dtypes(ours, theirs)
    assert_trees_all_close(ours, theirs, atol=TOL, rtol=0)


@pytest.mark.parametrize(
    ("flavour", "method"),
    [(LINEN, "__init__"), (LINEN, "__call__"), (NNX, "__init__")],
    ids=["linen-init", "linen-call", "nnx-init"],
)
@all_norms
def test_signatures_are_those_of_flax(flavour, name, method):
    theirs, ours = (
        [
            (p.name, p.kind, p.default)
            for p in inspect.signature(getattr(getattr(norms, name), method)).parameters.values()
        ]
        for norms in flavour
    )
    after = [p for p in ours if p[0] in ("parent", "name")]  # linen's, that end every signature
    own = [p for p in ours if p not in theirs]
    first = [p for p in theirs if p not in after]
    assert ours == first + own + after
    every = {"__init__": ["scale_offset"], "__call__": ["scale", "bias"]}[method]
    before = ["virtual_batch_size"] if method == "__init__" else []
    # nnx freezes by jaxnorm.nnx.freeze.
    last = ["frozen"] if method == "__init__" and flavour[1] is jaxnorm.linen else []
    extra = [*before, *every, "renorm", *last] if name == "BatchNorm" else every
    assert [p[0] for p in own] == extra
    assert all(p[2] in (None, 0.0, False) for p in own)  # changes nothing when left alone


@all_norms
def test_calls_in_nnx_have_the_positions_of_flax(name):
    call = getattr(jaxnorm.nnx, name).__call__
    *ours, given = inspect.signature(call).parameters.values()
    theirs = inspect.signature(getattr(nnx, name).__call__).parameters.values()
    assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in theirs]
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in ours)
    assert given.kind is given.VAR_KEYWORD
    own = ["scale", "bias", "renorm"] if name == "BatchNorm" else ["scale", "bias"]
    assert call.__kwdefaults__ == dict.fromkeys(own)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (jaxnorm.batch_norm, "BatchNorm"),
        (jaxnorm.layer_norm, "LayerNorm"),
        (jaxnorm.rms_norm, "RMSNorm"),
        (jaxnorm.group_norm, "GroupNorm"),
        (jaxnorm.instance_norm, "InstanceNorm"),
    ],
)
def test_functions_share_names_and_defaults_with_the_modules(function, name):
    ours = inspect.signature(function).parameters
    theirs = inspect.signature(getattr(nn, name)).parameters
    shared = {argument: theirs[argument].default for argument in ours if argument in theirs}
    assert {argument: ours[argument].default for argument in shared} == shared
    assert {"x", "params", "epsilon", "where"} <= set(ours)
    assert "epsilon" in shared


@both_flavours
@all_norms
def test_an_instance_is_one_of_the_flax_class(flavour, name):
    flax_norms, our_norms = flavour
    assert isinstance(build(our_norms, name), getattr(flax_norms, name))
    assert getattr(our_norms, name).__name__ == name  # names of submodules are made of it


@both_flavours
@all_norms
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_variables_of_the_same_seed_are_identical(flavour, name, param_dtype):
    random = (nn.initializers.normal(1.0), nn.initializers.uniform())
    theirs, ours = (
        evaluate(norms, name, jnp.ones(SHAPE), initializers=random, param_dtype=param_dtype)[1]
        for norms in flavour
    )
    assert_trees_all_equal(ours, theirs, strict=True)
    assert any(v.dtype == param_dtype and jnp.std(v) > 0 for v in jax.tree.leaves(ours))


@both_flavours
@all_norms
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.int32])
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("result", [None, jnp.float16, jnp.bfloat16, jnp.float32])
def test_output_dtype_is_that_of_flax(flavour, name, dtype, param_dtype, result):
    x = jax.ShapeDtypeStruct(SHAPE, dtype)
    theirs, ours = (
        jax.eval_shape(
            functools.partial(evaluate, norms, name, dtype=result, param_dtype=param_dtype), x
        )
        for norms in flavour
    )
    assert_trees_all_equal_dtypes(ours, theirs)


@both_flavours
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm"])
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.complex64])
def test_complex_values_are_those_of_flax(flavour, name, param_dtype, rng):
    x = jnp.asarray(1 + rng.normal(size=SHAPE) + 1j * rng.normal(size=SHAPE), jnp.complex64)
    compare(flavour, name, x, param_dtype=param_dtype)


@both_flavours
@pytest.mark.parametrize(
    ("name", "arguments", "mask_axes"),
    [
        ("BatchNorm", {}, None),
        ("BatchNorm", {"axis": 1, "momentum": 0.5, "epsilon": 0.1}, 4),
        ("BatchNorm", {"use_scale": False, "use_fast_variance": False}, 3),
        ("BatchNorm", {"use_bias": False, "momentum": 0.0}, None),
        ("LayerNorm", {}, 4),
        ("LayerNorm", {"reduction_axes": (1, 2), "use_bias": False}, 3),
        ("LayerNorm", {"reduction_axes": 1, "feature_axes": (-1, 1), "epsilon": 0.1}, None),
        ("LayerNorm", {"reduction_axes": (1, 2, 3), "feature_axes": (1, 2, 3)}, None),
        ("RMSNorm", {"reduction_axes": (-1, -2)}, 3),
        ("RMSNorm", {"feature_axes": (2, 3), "epsilon": 0.1}, None),
        ("RMSNorm", {"use_scale": False}, 4),
        ("GroupNorm", {}, 4),
        ("GroupNorm", {"num_groups": None, "group_size": 2, "epsilon": 0.1}, None),
        ("GroupNorm", {"num_groups": 6, "use_scale": False}, None),
        ("GroupNorm", {"num_groups": 1, "reduction_axes": (1, 2, 3), "use_bias": False}, 4),
        ("InstanceNorm", {}, 3),
        ("InstanceNorm", {"feature_axes": (1, 3), "epsilon": 0.1}, None),
        ("InstanceNorm", {"use_scale": False, "use_bias": False}, 4),
    ],
)
def test_values_are_those_of_flax(flavour, name, arguments, mask_axes, rng):
    x = jnp.asarray(1 + rng.normal(size=SHAPE), jnp.float32)
    mask = None
    if mask_axes:  # all four, or all but the features'
        mask = rng.random((*SHAPE[:mask_axes], 1)[:4]) < 0.7
        mask[:, :, ::2] |= mask_axes == 3  # some count wherever statistics are shared
        mask[..., ::2] |= mask_axes == 4
        assert not mask.all()
        mask = jnp.asarray(mask)
    compare(flavour, name, x, mask, **arguments)


@both_flavours
def test_running_statistics_and_evaluation_are_those_of_flax(flavour, rng):
    batches = jnp.asarray(rng.normal(size=(5, *SHAPE)) + rng.normal(size=6), jnp.float32)
    theirs, ours = (running_statistics(norms, batches) for norms in flavour)
    assert_trees_all_close(ours, theirs, atol=TOL, rtol=0)
    assert np.std(ours[0]) > 0.1  # they did move


def running_statistics(norms, batches):
    """Mean and variance after the batches, and the output in evaluation."""
    module = build(norms, "BatchNorm", momentum=0.5)
    if norms in NNX:
        for x in batches:
            module(x)
        module.eval()
        return module.mean[...], module.var[...], module(batches[0])
    variables = module.init(jax.random.key(0), batches[0])
    for x in batches:
        variables |= module.apply(variables, x, mutable=["batch_stats"])[1]
    stats = variables["batch_stats"]
    evaluation = norms.BatchNorm(use_running_average=True)
    return stats["mean"], stats["var"], evaluation.apply(variables, batches[0])


class Network(nn.Module):
    """A small network of all norms; the module of the norms is all that differs."""

    norms: Any

    @nn.compact
    def __call__(self, x):
        for name in ("BatchNorm", "GroupNorm", "InstanceNorm"):
            x = nn.relu(build(self.norms, name)(nn.Dense(8)(x)))
        x = self.norms.LayerNorm()(nn.Dense(8)(x.mean((1, 2))))
        return nn.Dense(1)(self.norms.RMSNorm()(x))


class NnxNetwork(nnx.Module):
    """The same for nnx."""

    def __init__(self, norms):
        rngs = nnx.Rngs(0)
        self.hidden = nnx.List(nnx.Linear(size, 8, rngs=rngs) for size in (3, 8, 8))
        names = ("BatchNorm", "GroupNorm", "InstanceNorm")
        self.norms = nnx.List(build(norms, name, (8,)) for name in names)
        self.dense, self.head = (nnx.Linear(8, size, rngs=rngs) for size in (8, 1))
        self.layer_norm, self.rms_norm = norms.LayerNorm(8, rngs=rngs), norms.RMSNorm(8, rngs=rngs)

    def __call__(self, x):
        for dense, norm in zip(self.hidden, self.norms, strict=True):
            x = nnx.relu(norm(dense(x)))
        x = self.layer_norm(self.dense(x.mean((1, 2))))
        return self.head(self.rms_norm(x))


def linen_losses(norms, optimizer, x, target):
    """The losses of ten steps of training."""
    network = Network(norms)
    variables = network.init(jax.random.key(0), x)
    memory = optimizer.init(variables["params"])

    def loss_of(params, variables):
        y, updates = network.apply({**variables, "params": params}, x, mutable=["batch_stats"])
        return jnp.mean((y - target) ** 2), updates

    @jax.jit
    def step(variables, memory):
        params = variables["params"]
        (loss, rest), gradient = jax.value_and_grad(loss_of, has_aux=True)(params, variables)
        updates, memory = optimizer.update(gradient, memory)
        return loss, {**rest, "params": optax.apply_updates(params, updates)}, memory

    losses = []
    for _ in range(10):
        loss, variables, memory = step(variables, memory)
        losses.append(loss)
    return np.array(losses)


def nnx_losses(norms, optimizer, x, target):
    """The losses of ten steps of training."""
    network = NnxNetwork(norms)
    optimizer = nnx.Optimizer(network, optimizer, wrt=nnx.Param)

    @nnx.jit
    def step(network, optimizer):
        def loss_of(network):
            return jnp.mean((network(x) - target) ** 2)

        loss, gradient = nnx.value_and_grad(loss_of)(network)
        optimizer.update(network, gradient)
        return loss

    return np.array([step(network, optimizer) for _ in range(10)])


@pytest.mark.parametrize(
    "flavour",
    [pytest.param(LINEN, id="linen", marks=pytest.mark.thorough), pytest.param(NNX, id="nnx")],
)
def test_changing_the_import_keeps_the_loss_curve(flavour, rng):
    x = jnp.asarray(rng.normal(size=(8, 6, 6, 3)), jnp.float32)
    target = jnp.asarray(rng.normal(size=(8, 1)), jnp.float32)
    losses = linen_losses if flavour == LINEN else nnx_losses
    with jax.numpy_dtype_promotion("standard"):  # Adam needs it
        theirs, ours = (losses(norms, optax.adam(0.01), x, target) for norms in flavour)
    assert theirs[-1] < 0.8 * theirs[0]  # it learns
    np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)
