"""The nnx modules: under nnx's transforms, in training and evaluation, and their errors."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from chex import assert_trees_all_close, assert_trees_all_equal
from flax import nnx

import jaxnorm.linen
import jaxnorm.nnx as jn

NAMES = ["BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm"]
TRUTH: dict[str, Any] = {
    "BatchNorm": oracle.batch_norm,
    "LayerNorm": oracle.layer_norm,
    "RMSNorm": oracle.rms_norm,
    "GroupNorm": lambda x: oracle.group_norm(x, num_groups=2),
    "InstanceNorm": oracle.instance_norm,
}
TOL = 32 * float(np.finfo(np.float32).eps)  # a few roundings of numbers below 8, in another order

all_norms = pytest.mark.parametrize("name", NAMES)


def make(name, norms: Any = jn, rngs=None, **arguments) -> Any:
    """A module for six features."""
    if name == "GroupNorm":
        arguments = {"num_groups": 2, **arguments}
    return getattr(norms, name)(6, rngs=rngs or nnx.Rngs(0), **arguments)


def normal(rng, *shape, mean=0.0):
    """Normal numbers."""
    return jnp.asarray(rng.normal(mean, size=shape), jnp.float32)


def values(module):
    """The variables of a module as plain arrays; copies, for a call may change the module."""
    return jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(module)))


def loss(module, x):
    """Some function of the output."""
    return jnp.sum(jnp.sin(module(x)))


@pytest.mark.parametrize("name", ["BatchNorm", "LayerNorm", "GroupNorm", "InstanceNorm"])
def test_flax_issue_1491_cancellation_in_the_variance(name, rng):
    x = normal(rng, 8, 16, 16, 6, mean=1e4)
    y = make(name)(x)
    assert oracle.units(y, TRUTH[name](x)) < 4
    assert abs(np.std(y) - 1) < 1e-3


def test_haiku_issue_396_and_equinox_issue_876_half_precision(rng):
    x = jnp.asarray(rng.normal(1000, 3, (512, 6)), jnp.float16)
    norm = make("BatchNorm", dtype=jnp.float16, momentum=0.0)
    y, truth = np.asarray(norm(x), np.float64), oracle.batch_norm(x)
    rounding = float(np.finfo(np.float16).eps) * np.abs(truth).max()  # of the result, once
    np.testing.assert_allclose(y, truth, atol=rounding, rtol=0)
    # The statistics are not rounded to the half precision that promote_dtype makes of all else.
    mean, var, _ = oracle.statistics(np.asarray(x, np.float64), 0)
    np.testing.assert_allclose(norm.mean[...], mean[0], rtol=TOL)
    np.testing.assert_allclose(norm.var[...], var[0], rtol=TOL)
    norm.eval()
    np.testing.assert_allclose(np.asarray(norm(x), np.float64), truth, atol=rounding, rtol=0)


@pytest.mark.parametrize("axes", [(2, 3), (1, 3), (3,), (-1, -3)])
def test_group_norm_with_reduction_axes_agrees_with_linen(axes, rng):
    x = normal(rng, 2, 6, 4, 6)
    y = make("GroupNorm", reduction_axes=axes)(x)
    linen = jaxnorm.linen.GroupNorm(num_groups=2, reduction_axes=axes)
    assert_trees_all_equal(y, linen.init_with_output(jax.random.key(0), x)[0])
    shared = (*(axis % 4 for axis in axes if axis % 4 != 3), 4)
    truth = oracle.standardized(x.reshape(2, 6, 4, 2, 3), shared, 1e-6)[0]
    assert oracle.units(y, truth.reshape(x.shape)) < 4


@all_norms
def test_a_mask_may_be_the_same_for_all_features(name, rng):
    x = normal(rng, 2, 4, 5, 6)
    mask = jnp.asarray(rng.random((2, 4, 5, 1)) < 0.7)
    y = make(name)(x, mask=mask)
    full = jnp.broadcast_to(mask, x.shape)
    assert_trees_all_close(y, make(name)(x, mask=full), atol=TOL, rtol=0)
    assert jnp.abs(y - make(name)(x)).max() > 0.1


@pytest.mark.parametrize("masked", [False, True])
def test_flax_issue_4760_one_batch_norm_for_all_examples_of_a_vmap(masked, rng):
    x = normal(rng, 4, 8, 6, mean=2.0)
    mask = rng.random(x.shape) < (0.5 if masked else 1)
    mask[0] &= not masked  # flax issue 2417: nothing here counts
    norm, whole = make("BatchNorm", axis_name="examples"), make("BatchNorm")

    @nnx.vmap(in_axes=(None, 0, 0), axis_name="examples")
    def examples(norm, x, mask):
        return norm(x, mask=mask)

    for _ in range(2):
        y = examples(norm, x, jnp.asarray(mask)).reshape(32, 6)
        expected = whole(x.reshape(32, 6), mask=jnp.asarray(mask).reshape(32, 6))
        assert_trees_all_close((y, values(norm)), (expected, values(whole)), atol=TOL, rtol=0)


@all_norms
def test_flax_issue_2606_and_jax_issue_28666_unbound_axis_name(name):
    norm, x = make(name, axis_name="batch"), jnp.ones((2, 4, 6))
    with pytest.raises(ValueError, match="'batch'") as error:
        nnx.jit(lambda norm, x: norm(x))(norm, x)
    for word in ("shard_map", "pmap", "vmap", "jit"):
        assert word in str(error.value)
    if name == "BatchNorm":
        norm.eval()  # needs no other device
        assert norm(x).shape == x.shape


@all_norms
@pytest.mark.parametrize("transform", [nnx.jit, nnx.remat])
def test_jit_and_remat_change_neither_values_nor_gradients(transform, name, rng):
    x = normal(rng, 2, 4, 6)
    plain, module = make(name), make(name)
    expected = nnx.value_and_grad(loss, argnums=(0, 1))(plain, x)
    results = nnx.jit(nnx.value_and_grad(transform(loss), argnums=(0, 1)))(module, x)
    # Gradients are sums of up to 48 terms (2 * 4 * 6), each of which is rounded as a value is.
    assert_trees_all_close(results, expected, atol=x.size * TOL, rtol=0)
    assert_trees_all_close(values(module), values(plain), atol=TOL, rtol=0)


@all_norms
def test_the_gradients_of_scale_and_bias_are_those_of_the_equation(name, rng):
    x = normal(rng, 4, 5, 6)
    gradient = nnx.grad(loss)(make(name), x)
    h = TRUTH[name](x)
    for parameter, truth in (("scale", np.cos(h) * h), ("bias", np.cos(h))):
        if parameter in gradient:
            terms = x.size // 6  # of a sum, each of which is rounded as a value is
            np.testing.assert_allclose(
                gradient[parameter][...], truth.sum((0, 1)), atol=terms * TOL, rtol=0
            )


def stack(**arguments):
    """Three batch norms of different scales in one module."""

    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def create(rngs):
        return make("BatchNorm", rngs=rngs, scale_init=nnx.initializers.normal(1.0), **arguments)

    return create(nnx.Rngs(0))


def part(module, index):
    """One of the modules of a stack, by itself."""
    graph, state = nnx.split(module)
    return nnx.merge(graph, jax.tree.map(lambda a: a[index], state))


def test_scan_runs_layers_that_each_keep_their_statistics(rng):
    x = normal(rng, 8, 6, mean=2.0)
    layers = stack()
    parts = [part(layers, index) for index in range(3)]
    y = nnx.scan(lambda layer, x: layer(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(layers, x)
    for index, layer in enumerate(parts):
        x = layer(x)
        assert_trees_all_close(values(part(layers, index)), values(layer), atol=TOL, rtol=0)
    assert_trees_all_close(y, x, atol=3 * TOL, rtol=0)  # three layers


def test_vmap_over_modules_keeps_them_apart(rng):
    x = normal(rng, 3, 8, 6, mean=2.0)
    ensemble = stack()
    parts = [part(ensemble, index) for index in range(3)]
    y = nnx.vmap(lambda member, x: member(x))(ensemble, x)
    for index, member in enumerate(parts):
        assert_trees_all_close(y[index], member(x[index]), atol=TOL, rtol=0)
        assert_trees_all_close(values(part(ensemble, index)), values(member), atol=TOL, rtol=0)


@all_norms
def test_eval_shape_makes_modules_and_outputs_without_arrays(name):
    abstract = nnx.eval_shape(lambda: make(name))
    for ours, theirs in zip(
        jax.tree.leaves(nnx.state(abstract)), jax.tree.leaves(nnx.state(make(name))), strict=True
    ):
        assert isinstance(ours, jax.ShapeDtypeStruct)
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    x = jax.ShapeDtypeStruct((2, 4, 6), jnp.float32)
    assert nnx.eval_shape(lambda norm, x: norm(x), abstract, x).shape == x.shape


def test_references_hold_no_tracer_after_a_gradient(rng):
    x = normal(rng, 8, 6, mean=2.0)
    with nnx.var_defaults(ref=True):
        norm = make("BatchNorm")
    plain = make("BatchNorm")
    gradient = jax.grad(lambda x: loss(norm, x))(x)
    assert_trees_all_close(gradient, nnx.grad(loss, argnums=1)(plain, x), atol=TOL)
    assert_trees_all_close(norm.mean[...], plain.mean[...], atol=TOL)


def test_train_eval_view_set_view_and_the_call_choose_the_statistics(rng):
    x = normal(rng, 8, 6, mean=2.0)
    norm = make("BatchNorm")
    before = values(norm)
    evaluated = x / np.sqrt(np.float32(1 + 1e-5))  # the running statistics are zero and one
    assert_trees_all_close(norm(x, use_running_average=True), evaluated, atol=TOL)
    assert_trees_all_close(nnx.view(norm, use_running_average=True)(x), evaluated, atol=TOL)
    norm.eval()
    assert_trees_all_close(norm(x), evaluated, atol=TOL)
    norm.train()
    norm.set_view(use_running_average=True)
    assert_trees_all_close(norm(x), evaluated, atol=TOL)
    assert_trees_all_equal(values(norm), before)
    assert oracle.units(norm(x, use_running_average=False), oracle.batch_norm(x)) < 4
    assert jnp.all(norm.mean[...] != before["mean"])


@all_norms
def test_metadata_is_that_of_flax(name):
    metadata: dict[str, Any] = {"scale_metadata": {"note": "scale"}}
    if name != "RMSNorm":
        metadata["bias_metadata"] = {"note": "bias"}
    for parameter in (field.removesuffix("_metadata") for field in metadata):
        theirs, ours = (
            getattr(make(name, norms, **metadata), parameter).get_metadata() for norms in (nnx, jn)
        )
        assert ours == theirs
        assert ours["note"] == parameter


@all_norms
def test_promote_dtype_is_called_as_flax_calls_it(name):
    def record(args, /, *, dtype):
        calls.append(([a if a is None else (a.shape, a.dtype) for a in args], dtype))
        return tuple(a if a is None else a.astype(jnp.bfloat16) for a in args)

    x, calls = jnp.ones((2, 4, 6), jnp.float16), []
    arguments: Any = {"promote_dtype": record, "dtype": jnp.bfloat16}
    with jax.numpy_dtype_promotion("standard"):
        theirs = make(name, nnx, **arguments)(x)
    ours = make(name, **arguments)(x)
    assert ours.dtype == theirs.dtype == jnp.bfloat16
    assert len(calls) == 2
    assert calls[0] == calls[1]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("BatchNorm", {"use_running_average": None}),
        ("GroupNorm", {"num_groups": 4}),
        ("GroupNorm", {"num_groups": 2, "group_size": 3}),
        ("GroupNorm", {"num_groups": None}),
        ("GroupNorm", {"num_groups": None, "group_size": 4}),
        ("InstanceNorm", {"feature_axes": 0}),
        ("InstanceNorm", {"feature_axes": (3, -4)}),
    ],
)
def test_errors_are_value_errors_with_a_sentence_as_in_flax(name, arguments):
    for norms in (nnx, jn):
        with pytest.raises(ValueError, match=r"\w+ \w+ \w+"):
            make(name, norms, **arguments)(jnp.ones((2, 3, 4, 6)))


@pytest.mark.parametrize("axes", [(1, 2), 0])
def test_group_norm_refuses_reduction_axes_without_the_last(axes):
    with pytest.raises(ValueError, match="reduction_axes"):
        make("GroupNorm", reduction_axes=axes)(jnp.ones((2, 3, 4, 6)))


@pytest.mark.parametrize("direction", ["from_flax", "to_flax"])
def test_an_orbax_checkpoint_of_the_one_loads_in_the_other(direction, rng, tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint", reason="checkpoints are written by orbax")
    x = normal(rng, 4, 32, 6)
    flavours = (nnx, jn) if direction == "from_flax" else (jn, nnx)
    random = {"scale_init": nnx.initializers.uniform()}
    writer, reader = (
        nnx.Dict({name: make(name, norms, **arguments) for name in NAMES})
        for norms, arguments in zip(flavours, (random, {}), strict=True)
    )
    writer.BatchNorm(x)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", nnx.state(writer))
        checkpointer.wait_until_finished()
        nnx.update(reader, checkpointer.restore(tmp_path / "checkpoint", nnx.state(reader)))
    assert_trees_all_equal(values(reader), values(writer), strict=True)
    for name in NAMES:
        assert_trees_all_close(reader[name](x), writer[name](x), atol=TOL, rtol=0)
