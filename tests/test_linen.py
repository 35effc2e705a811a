"""The linen modules: over devices, on hard data, under linen's transforms, and their errors."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from chex import assert_trees_all_close, assert_trees_all_equal, assert_trees_all_equal_dtypes
from jax.sharding import Mesh, PartitionSpec

import jaxnorm.linen as jn


def five(norms, **arguments) -> dict[str, Any]:
    """One of each, of Flax or of ours."""
    return {
        "BatchNorm": norms.BatchNorm(use_running_average=False, **arguments),
        "LayerNorm": norms.LayerNorm(**arguments),
        "RMSNorm": norms.RMSNorm(**arguments),
        "GroupNorm": norms.GroupNorm(num_groups=2, **arguments),
        "InstanceNorm": norms.InstanceNorm(**arguments),
    }


NORMS = five(jn)
TRUTH: dict[str, Any] = {
    "BatchNorm": oracle.batch_norm,
    "LayerNorm": oracle.layer_norm,
    "GroupNorm": lambda x: oracle.group_norm(x, num_groups=2),
    "InstanceNorm": oracle.instance_norm,
}
KEY = jax.random.key(0)
DEVICES = 4
TOL = 32 * float(np.finfo(np.float32).eps)  # a few roundings of numbers below 8, in another order

all_norms = pytest.mark.parametrize("name", NORMS)


def normal(rng, *shape, mean=0.0, std=1.0, dtype=jnp.float32):
    """Normal numbers."""
    return jnp.asarray(rng.normal(mean, std, shape), dtype)


def on_devices(how, f):
    """Map f over the first axis, and call that axis "devices"."""
    if how == "vmap":
        return jax.jit(jax.vmap(f, axis_name="devices"))
    if how == "pmap":
        return jax.pmap(f, axis_name="devices")

    def block(*args):
        return jax.tree.map(lambda a: a[None], f(*(a[0] for a in args)))

    mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("devices",))
    spec = PartitionSpec("devices")
    return jax.jit(jax.shard_map(block, mesh=mesh, in_specs=spec, out_specs=spec))  # check_vma on


def train(norm, x, mask=None) -> tuple[Any, Any]:
    """The output and the new running statistics."""
    masked = {} if mask is None else {"mask": mask}
    variables = norm.init(KEY, x, **masked)
    return norm.apply(variables, x, **masked, mutable=["batch_stats"])


@pytest.mark.parametrize(
    ("name", "how"),
    [(name, "vmap") for name in NORMS]
    + [("BatchNorm", "shard_map"), ("BatchNorm", "pmap"), ("GroupNorm", "shard_map")],
)
def test_flax_issue_2417_masked_mean_across_devices(name, how, rng):
    norm = NORMS[name]
    if name in ("LayerNorm", "RMSNorm"):
        norm = norm.clone(reduction_axes=(1, 2, 3))  # the second is spread over the devices
    x = rng.normal(2, size=(DEVICES, 2, 3, 5, 6)).astype(np.float32)
    mask = rng.random(x.shape) < np.array([0.9, 0.0, 0.5, 0.2]).reshape(-1, 1, 1, 1, 1)
    assert not mask[1].any()  # nothing on this device counts

    def one(x, mask):
        return train(norm.clone(axis_name="devices"), x, mask)

    y, stats = on_devices(how, one)(x, mask)
    expected, expected_stats = train(norm, *(jnp.concatenate(a, axis=1) for a in (x, mask)))
    assert_trees_all_close(np.concatenate(y, axis=1), expected, atol=TOL, rtol=0)
    for stat, value in expected_stats.get("batch_stats", {}).items():
        np.testing.assert_allclose(stats["batch_stats"][stat], [value] * DEVICES, atol=TOL)


@pytest.mark.parametrize("how", ["shard_map", "pmap", "vmap"])
@pytest.mark.parametrize("groups", [[[0, 2], [1, 3]], [[3], [1, 0, 2]]], ids=["even", "uneven"])
def test_jax_issue_19709_axis_index_groups(groups, how, rng):
    norm = jn.BatchNorm(use_running_average=False)
    sharing = norm.clone(axis_name="devices", axis_index_groups=groups)
    x = rng.normal(2, size=(DEVICES, 3, 5)).astype(np.float32)
    y, stats = jax.device_get(on_devices(how, lambda x: train(sharing, x))(x))
    for group in groups:
        expected, expected_stats = train(norm, jnp.concatenate(x[group]))
        np.testing.assert_allclose(np.concatenate(y[group]), expected, atol=TOL)
        for stat, value in expected_stats["batch_stats"].items():
            mine = stats["batch_stats"][stat][group]
            np.testing.assert_allclose(mine, [value] * len(group), atol=TOL)


@all_norms
def test_flax_issue_2606_and_jax_issue_28666_unbound_axis_name(name):
    norm, x = NORMS[name].clone(axis_name="batch"), jnp.ones((2, 4, 6))
    variables = norm.init(KEY, x)  # initialization needs no name
    with pytest.raises(ValueError, match="'batch'") as error:
        jax.jit(lambda x: norm.apply(variables, x, mutable=["batch_stats"]))(x)
    for word in ("shard_map", "pmap", "vmap", "jit"):
        assert word in str(error.value)


@pytest.mark.parametrize("name", TRUTH)
def test_flax_issue_1491_cancellation_in_the_variance(name, rng):
    x = normal(rng, 8, 16, 16, 6, mean=1e4)
    y, _ = train(NORMS[name], x)
    assert oracle.units(y, TRUTH[name](x)) < 4
    assert abs(np.std(y) - 1) < 1e-3


@pytest.mark.parametrize("name", TRUTH)
@pytest.mark.parametrize(
    ("dtype", "mean"), [(jnp.float16, 1000.0), (jnp.bfloat16, 200.0)], ids=["float16", "bfloat16"]
)
@pytest.mark.parametrize("forced", [True, False])
def test_haiku_issue_396_and_equinox_issue_876_half_precision(name, dtype, mean, forced, rng):
    x = normal(rng, 4, 16, 16, 6, mean=mean, std=3, dtype=dtype)  # they are whole or half numbers
    truth = TRUTH[name](np.asarray(x, np.float64))
    norm = NORMS[name].clone(force_float32_reductions=forced)
    # Sums of up to 1024 terms, many of them alike: rounding grows with the root of their number.
    assert oracle.units(train(norm.clone(dtype=jnp.float32), x)[0], truth) < 32
    y = train(norm.clone(dtype=dtype), x)[0]
    assert y.dtype == dtype
    rounding = float(jnp.finfo(dtype).eps) * np.abs(truth).max()  # of the result, once
    np.testing.assert_allclose(np.asarray(y, np.float64), truth, atol=rounding, rtol=0)


@pytest.mark.parametrize("forced", [True, False])
def test_force_float32_reductions_decides_the_dtype_of_running_statistics(forced):
    x = jnp.ones((4, 3), jnp.bfloat16)
    arguments: Any = {
        "use_running_average": False,
        "force_float32_reductions": forced,
        "param_dtype": jnp.bfloat16,
    }
    variables: Any = jn.BatchNorm(**arguments).init(KEY, x)
    with jax.numpy_dtype_promotion("standard"):
        assert_trees_all_equal(variables, nn.BatchNorm(**arguments).init(KEY, x), strict=True)
    stats = train(jn.BatchNorm(**arguments), x)[1]["batch_stats"]
    assert_trees_all_equal_dtypes(stats, variables["batch_stats"])
    assert stats["mean"].dtype == (jnp.float32 if forced else jnp.bfloat16)


@all_norms
def test_masked_elements_do_not_count_whatever_they_are(name, rng):
    x = normal(rng, 2, 4, 5, 6)
    mask = jnp.asarray(rng.random(x.shape) < 0.7)
    expected, expected_stats = train(NORMS[name], x, mask)
    assert jnp.abs(expected - train(NORMS[name], x)[0]).max() > 0.1
    y, stats = train(NORMS[name], jnp.where(mask, x, jnp.nan), mask.astype(jnp.int32))
    assert_trees_all_equal(jnp.where(mask, y, 0), jnp.where(mask, expected, 0))
    assert_trees_all_equal(stats, expected_stats)


def test_initialization_and_evaluation_leave_the_running_statistics(rng):
    x = normal(rng, 8, 3, mean=5.0)
    norm = jn.BatchNorm(axis_name="batch")
    variables = norm.init(KEY, x, use_running_average=False)
    assert_trees_all_equal(variables["batch_stats"], {"mean": jnp.zeros(3), "var": jnp.ones(3)})
    y, updates = norm.apply(variables, x, use_running_average=True, mutable=["batch_stats"])
    assert_trees_all_equal(updates["batch_stats"], variables["batch_stats"])
    assert_trees_all_close(y, x / np.sqrt(np.float32(1 + 1e-5)), rtol=TOL)


def test_partitioning_metadata_is_that_of_flax():
    arguments: Any = {
        "scale_init": nn.with_partitioning(nn.initializers.ones, ("model",)),
        "bias_init": nn.with_partitioning(nn.initializers.normal(), ("model",)),
    }
    x = jnp.ones((2, 3))
    theirs, ours = (norms.LayerNorm(**arguments).init(KEY, x) for norms in (nn, jn))
    assert nn.get_partition_spec(ours) == nn.get_partition_spec(theirs)
    assert nn.get_partition_spec(ours)["params"]["scale"] == PartitionSpec("model")
    assert_trees_all_equal(ours, theirs, strict=True)
    assert train(jn.LayerNorm(**arguments), x)[0].shape == (2, 3)


@pytest.mark.parametrize("direction", ["from_flax", "to_flax"])
@pytest.mark.thorough
def test_an_orbax_checkpoint_of_the_one_loads_in_the_other(direction, rng, tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint", reason="checkpoints are written by orbax")
    x = normal(rng, 4, 32, 6)
    flavours = (nn, jn) if direction == "from_flax" else (jn, nn)
    writer, reader = (five(norms, scale_init=nn.initializers.uniform()) for norms in flavours)
    written = {name: norm.init(KEY, x) for name, norm in writer.items()}
    written["BatchNorm"] |= train(writer["BatchNorm"], x)[1]
    target = {name: jax.eval_shape(norm.init, KEY, x) for name, norm in reader.items()}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", written)
        checkpointer.wait_until_finished()
        read = checkpointer.restore(tmp_path / "checkpoint", target)
    assert_trees_all_equal(read, written, strict=True)
    for name in NORMS:
        y, z = (norms[name].apply(read[name], x, mutable=True) for norms in (writer, reader))
        assert_trees_all_close(z, y, atol=TOL, rtol=0)


@pytest.mark.parametrize(
    ("name", "arguments", "call"),
    [
        ("BatchNorm", {}, {}),
        ("BatchNorm", {"use_running_average": True}, {"use_running_average": True}),
        ("GroupNorm", {}, {}),
        ("GroupNorm", {"num_groups": 4}, {}),
        ("GroupNorm", {"num_groups": 0}, {}),
        ("GroupNorm", {"num_groups": 2, "group_size": 3}, {}),
        ("GroupNorm", {"num_groups": None}, {}),
        ("GroupNorm", {"num_groups": None, "group_size": 4}, {}),
        ("GroupNorm", {"num_groups": 2, "reduction_axes": (1, 2)}, {}),
        ("InstanceNorm", {"feature_axes": 0}, {}),
        ("InstanceNorm", {"feature_axes": (3, -4)}, {}),
        ("LayerNorm", {}, {"mask": jnp.ones((3, 6), bool)}),
    ],
)
def test_errors_are_value_errors_with_a_sentence_as_in_flax(name, arguments, call):
    x = jnp.ones((2, 3, 4, 6))
    for norms in (nn, jn):
        with pytest.raises(ValueError, match=r"\w+ \w+ \w+"):
            getattr(norms, name)(**arguments).init(KEY, x, **call)


class Layer(nn.Module):
    """A dense layer and a norm."""

    name_of_norm: str = "BatchNorm"

    @nn.compact
    def __call__(self, x):
        return NORMS[self.name_of_norm].clone(parent=self)(nn.Dense(6)(x))


@all_norms
@pytest.mark.parametrize("transform", [nn.jit, nn.remat])
def test_jit_and_remat_change_nothing(transform, name, rng):
    x = normal(rng, 2, 4, 6)
    variables = Layer(name).init(KEY, x)

    def results(layer):
        def f(params, x):
            y, stats = layer.apply({**variables, "params": params}, x, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(y)), (y, stats)

        return jax.jit(jax.grad(f, (0, 1), has_aux=True))(variables["params"], x)

    # The gradients of the dense layer are sums of 8 terms.
    transformed = results(transform(Layer)(name))
    assert_trees_all_close(transformed, results(Layer(name)), atol=8 * TOL, rtol=0)


class Layers(nn.Module):
    """Three layers by scan."""

    @nn.compact
    def __call__(self, x):
        run = nn.scan(
            lambda layer, x, _: (layer(x), None),
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=3,
        )
        return run(Layer(name="layer"), x, None)[0]


def test_scan_runs_layers_that_each_keep_their_statistics(rng):
    x = normal(rng, 8, 6)
    variables = Layers().init(KEY, x)
    y, updates = Layers().apply(variables, x, mutable=["batch_stats"])

    def of_layer(tree, index):
        return {kind: jax.tree.map(lambda a: a[index], tree[kind]["layer"]) for kind in tree}

    for index in range(3):
        x, stats = Layer().apply(of_layer(variables, index), x, mutable=["batch_stats"])
        assert_trees_all_close(of_layer(updates, index), stats, atol=TOL, rtol=0)
    assert_trees_all_close(y, x, atol=3 * TOL, rtol=0)


@pytest.mark.parametrize("one_for_all", [True, False])
def test_vmap_shares_the_module_or_makes_one_each(one_for_all, rng):
    x = normal(rng, 4, 8, 6)
    mapped = nn.vmap(
        jn.BatchNorm,
        variable_axes=dict.fromkeys(("params", "batch_stats"), None if one_for_all else 0),
        split_rngs={"params": not one_for_all},
        axis_name="examples",
    )(use_running_average=False, axis_name="examples" if one_for_all else None)
    y, stats = train(mapped, x)
    if one_for_all:
        z, expected = train(NORMS["BatchNorm"], x.reshape(32, 6))
        z = z.reshape(x.shape)
    else:
        z, expected = jax.vmap(lambda x: train(NORMS["BatchNorm"], x))(x)
    assert_trees_all_close((y, stats), (z, expected), atol=TOL, rtol=0)
