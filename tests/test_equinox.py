"""Drop-ins for Equinox: signatures, fields, values, errors."""

import dataclasses
import inspect
import io
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beside_equinox import (
    BOTH,
    MODES,
    as_equinox,
    both_modes,
    close,
    eqx,
    errors,
    filled,
    jn,
    make,
    mapped,
)
from chex import assert_trees_all_equal, assert_trees_all_equal_dtypes

NAMES = ["LayerNorm", "RMSNorm", "GroupNorm", "BatchNorm"]

all_norms = pytest.mark.parametrize("name", NAMES)


def test_only_jaxnorm_equinox_imports_equinox_and_its_error_names_the_package():
    code = """
import sys, jaxnorm
assert not {"equinox", "jaxnorm.equinox"} & set(sys.modules)
sys.modules["equinox"] = None  # which makes the import fail
try:
    import jaxnorm.equinox
except ImportError as error:
    sys.exit(not str(error).endswith("pip install equinox."))
sys.exit("no error")"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@all_norms
def test_signatures_are_those_of_equinox(name):
    theirs, ours = (getattr(nn, name) for nn in BOTH)
    assert ours.__init__ is theirs.__init__
    signature = inspect.signature(theirs.__call__)
    assert inspect.signature(ours.__call__) == signature
    del ours.__call__.__signature__  # what the function takes by itself
    try:
        own = inspect.signature(ours.__call__).parameters.values()
    finally:
        ours.__call__.__signature__ = signature
    kinds = [(p.name, p.kind, p.default) for p in signature.parameters.values()]
    assert [(p.name, p.kind, p.default) for p in own] == kinds


@all_norms
@both_modes
def test_trees_are_those_of_equinox(name, mode):
    arguments = {"mode": mode} if name == "BatchNorm" else {}
    theirs, ours = (make(nn, name, **arguments) for nn in BOTH)
    assert isinstance(ours[0], getattr(eqx.nn, name))
    assert repr(ours) == repr(theirs)
    fields = [
        [(f.name, f.metadata) for f in dataclasses.fields(norm)] for norm, _ in (ours, theirs)
    ]
    assert fields[0] == fields[1]
    flat = [jax.tree_util.tree_flatten_with_path(tree)[0] for tree in (ours, theirs)]
    assert [path for path, _ in flat[0]] == [path for path, _ in flat[1]]
    assert_trees_all_equal(*([leaf for _, leaf in one if eqx.is_array(leaf)] for one in flat))


def test_the_default_mode_is_ema_with_the_warning_of_equinox():
    with pytest.warns(UserWarning, match="unspecified"):
        assert jn.BatchNorm(3, "b").mode == "ema"


ONE_EXAMPLE = {
    "layer": ("LayerNorm", (4, 6), {}),
    "layer-plain": ("LayerNorm", (4, 6), {"use_weight": False, "use_bias": False, "eps": 0.1}),
    "rms": ("RMSNorm", (4, 6), {}),
    "rms-scale": ("RMSNorm", (4, 6), {"use_bias": False, "eps": 0.1}),
    "group-features": ("GroupNorm", (6,), {}),
    "group": ("GroupNorm", (6, 3, 2), {}),
    "group-plain": ("GroupNorm", (6, 3, 2), {"channelwise_affine": False, "eps": 0.1}),
}


@pytest.mark.parametrize("case", ONE_EXAMPLE)
def test_values_and_gradients_are_those_of_equinox(case, rng):
    name, shape, arguments = ONE_EXAMPLE[case]
    x, dy = (jnp.asarray(rng.normal(1, 2, (5, *shape)), jnp.float32) for _ in range(2))

    def results(nn):
        norm, _ = make(nn, name, **arguments)

        def loss(args):
            norm, x = args
            y = jax.vmap(norm)(x)
            return jnp.sum(y * dy), y

        return jax.tree.leaves(eqx.filter_jit(eqx.filter_grad(loss, has_aux=True))((norm, x)))

    theirs, ours = map(results, BOTH)
    close(ours, theirs)


@all_norms
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("params", [jnp.float32, jnp.bfloat16])
def test_the_result_has_the_dtype_of_x_and_the_state_keeps_its_own(name, dtype, params):
    x = jax.ShapeDtypeStruct((5, 4, 6) if name in ("LayerNorm", "RMSNorm") else (5, 6, 3), dtype)
    norm, state = make(jn, name, dtype=params)
    y, after = jax.eval_shape(mapped(norm), x, state)
    assert y.dtype == dtype
    assert_trees_all_equal_dtypes(after, state)
    if name != "BatchNorm":  # there Equinox promotes, or rejects a state of another dtype
        theirs = jax.eval_shape(mapped(make(eqx.nn, name, dtype=params)[0]), x, state)[0]
        assert theirs.dtype == dtype


@all_norms
def test_a_mean_that_is_much_larger_than_the_deviations(name, rng):
    shape = (4, 4, 6) if name in ("LayerNorm", "RMSNorm") else (64, 6, 8, 8)
    theirs, ours = errors(name, jnp.asarray(rng.normal(1e4, 1, shape), jnp.float32))
    assert ours < 4
    assert theirs > 20 or name == "RMSNorm"  # which does not subtract the mean


@pytest.mark.parametrize("writer", BOTH, ids=["from_equinox", "to_equinox"])
def test_a_checkpoint_of_the_one_loads_in_the_other(writer):
    (reader,) = set(BOTH) - {writer}
    for name, mode in [*((name, None) for name in NAMES), ("BatchNorm", "ema")]:
        arguments = {"mode": mode} if mode else {}
        written = make(writer, name, **arguments)
        written = written[0], filled(written[1])
        file = io.BytesIO()
        eqx.tree_serialise_leaves(file, written)
        file.seek(0)
        read = eqx.tree_deserialise_leaves(file, make(reader, name, **arguments))
        assert_trees_all_equal(jax.tree.leaves(read), jax.tree.leaves(written))
        assert isinstance(read[0], getattr(reader, name))


def model(nn):
    """A network of all norms, with batch norm in both modes."""
    linear = lambda a, b: eqx.nn.Linear(a, b, key=jax.random.key(b))
    batch_norms = [nn.BatchNorm(8, "b", momentum=0.9, mode=mode) for mode in MODES]
    others = [nn.GroupNorm(2, 8), nn.LayerNorm(8), nn.RMSNorm(8)]
    relu = eqx.nn.Lambda(jax.nn.relu)
    return eqx.nn.Sequential([linear(6, 8), *batch_norms, relu, *others, linear(8, 1)])


@pytest.mark.usefixtures("unoptimized")
def test_a_model_has_the_same_losses_by_either_import(rng):
    x, target = (jnp.asarray(rng.normal(size=(16, n)), jnp.float32) for n in (6, 1))

    def losses(nn):
        net, state = eqx.nn.make_with_state(model)(nn)

        def loss(net, state):
            y, state = mapped(net)(x, state)
            return jnp.mean((y - target) ** 2), state

        @eqx.filter_jit
        def step(net, state):
            (value, state), g = eqx.filter_value_and_grad(loss, has_aux=True)(net, state)
            return eqx.apply_updates(net, jax.tree.map(lambda a: -0.1 * a, g)), state, value

        with as_equinox(nn):
            for _ in range(8):
                net, state, value = step(net, state)
                yield float(value)

    theirs, ours = (list(losses(nn)) for nn in BOTH)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert ours[-1] < 0.7 * ours[0]  # it did learn


def test_a_state_that_a_norm_does_not_have_is_returned_as_it_is():
    for name in ("LayerNorm", "RMSNorm", "GroupNorm"):
        norm, _ = make(jn, name)
        x, state = jnp.ones(norm.shape if name != "GroupNorm" else 6), eqx.nn.State(())
        y, after = norm(x, state, key=jax.random.key(0))
        assert after is state
        assert_trees_all_equal(y, norm(x))


@pytest.mark.parametrize(
    ("name", "x", "words"),
    [
        ("LayerNorm", jnp.ones((5, 4, 6)), r"shape that .* \(4, 6\), got \(5, 4, 6\); map"),
        ("RMSNorm", jnp.ones(6), r"shape that .* \(4, 6\), got \(6,\); map"),
        ("GroupNorm", jnp.ones((4, 6)), r"the 6 channels .* got shape \(4, 6\); map"),
        ("BatchNorm", jnp.ones((4, 6)), r"the 6 channels .* got shape \(4, 6\); map"),
        ("BatchNorm", jnp.ones(()), r"the 6 channels .* got shape \(\); map"),
        ("BatchNorm", jnp.ones(6), r"axis_name must be bound .*vmap around this call, got 'b'"),
        ("BatchNorm", jnp.ones(6, jnp.complex64), "x must be real where the state is, got complex"),
        ("LayerNorm", jnp.ones((4, 6), int), "x must be floating-point or complex, got dtype int"),
    ],
)
def test_errors_are_one_sentence(name, x, words):
    norm, state = make(jn, name)
    with pytest.raises((TypeError, ValueError), match=words) as error:
        norm(x, state)
    assert str(error.value).count(". ") == 0
