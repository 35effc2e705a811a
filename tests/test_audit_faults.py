"""Findings of an audit: one norm with each fault."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

import jaxnorm.nnx as jnnx

DIFFER = "batch and running statistics differ"
CONSTANT = "features are constant in the batch"
BATCH_NOT_FINITE = "batch statistics are not finite"
RUNNING_NOT_FINITE = "running statistics are not finite"
HALF = "running statistics are in half precision"
MOMENTUM = "momentum looks like PyTorch's"
EPSILON = "epsilon is larger than the variance"
DEVICES = "devices disagree on running statistics"
UNTOUCHED = "running statistics were never updated"

pytestmark = pytest.mark.usefixtures("unoptimized")  # programs that run once or twice


def norm_of(changes: dict[str, Any], features=4) -> nnx.BatchNorm:
    """A norm with sound statistics for normal data, but for these changes."""
    arguments = {name: changes.pop(name) for name in ("momentum", "epsilon") if name in changes}
    norm = nnx.BatchNorm(features, rngs=nnx.Rngs(0), **arguments)
    stats = {"mean": jnp.full(features, 0.01), "var": jnp.full(features, 0.99)} | changes
    norm.mean.set_value(stats["mean"])
    norm.var.set_value(stats["var"])
    return norm


def half(value):
    return jnp.full(4, value, jnp.bfloat16)


X = np.random.default_rng(3).standard_normal((64, 4)).astype(np.float32)


def with_values(rows, columns, value):
    x = X.copy()
    x[rows, columns] = value
    return x


FAULTS = {
    "none": ({}, X, {}),
    "never updated": ({"mean": jnp.zeros(4), "var": jnp.ones(4)}, X + 9, {UNTOUCHED: {}}),
    "dead": ({}, with_values(slice(None), slice(1, 3), 7.3), {CONSTANT: {"features": 2, "of": 4}}),
    "nan in": ({}, with_values(5, 1, np.nan), {BATCH_NOT_FINITE: {"features": 1, "of": 4}}),
    "nan": ({"mean": jnp.array([0, np.nan, np.inf, 0])}, X, {RUNNING_NOT_FINITE: {"features": 2}}),
    "negative": ({"var": jnp.array([1, 1, 1, -0.1])}, X, {RUNNING_NOT_FINITE: {"features": 1}}),
    "half": ({"mean": half(0), "var": half(1.01)}, X, {HALF: {"bits": 16}}),
    "momentum": ({"momentum": 0.1}, X, {MOMENTUM: {"momentum": 0.1}}),
    "epsilon": (
        {"var": jnp.array([1, 1, 1, 1e-8]), "mean": jnp.zeros(4)},
        X * np.array([1, 1, 1, 1e-4], np.float32),
        {EPSILON: {"features": 1, "epsilon": 1e-5}},
    ),
    "small": (
        {"var": jnp.full(4, 1e-8), "mean": jnp.zeros(4)},
        1e-6 * X,
        {DIFFER: {}, EPSILON: {}},
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(fault):
    changes, x, expected = FAULTS[fault]
    found = jnnx.audit(norm_of(dict(changes)), jnp.asarray(x))
    assert [finding.problem for finding in found] == list(expected)
    for finding, figures in zip(found, expected.values(), strict=True):
        assert finding.path == ""
        assert figures == pytest.approx({key: finding.figures[key] for key in figures})
        assert finding.advice.endswith(".")
    assert str(found).count("the model") == len(expected)


@pytest.mark.parametrize(
    ("fault", "effect"),
    [
        ("never updated", 9),  # X + 9
        ("dead", 0.5**0.5),  # two of four features are zero
        ("nan", np.inf),
        ("nan in", np.inf),
        ("epsilon", 0.25**0.5 * (1 - 1e-3**0.5)),  # one of four, by the square root of 1e-8 / 1e-5
    ],
)
def test_effects(fault, effect):
    changes, x, _ = FAULTS[fault]
    found = jnnx.audit(norm_of(dict(changes)), jnp.asarray(x))
    assert len(found) == 1
    assert found[0].effect == pytest.approx(effect, rel=0.01)  # X has moments of its own
    assert ("  inf  " if np.isinf(effect) else f"  {found[0].effect:.2f}  ") in str(found)


def test_devices_that_disagree():
    """As the statistics of shards are, if nothing shares them and nothing checks that."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere, data = PartitionSpec(), PartitionSpec("data")
    local = jax.shard_map(
        lambda x: (x.mean(0), x.var(0)), mesh=mesh, in_specs=data, out_specs=(everywhere,) * 2,
        check_vma=False,
    )  # fmt: skip
    x = jnp.asarray(np.random.default_rng(0).standard_normal((512, 4)), jnp.float32)
    mean, var = jax.jit(local)(x)
    found = jnnx.audit(norm_of({"mean": mean, "var": var}), x[:64])
    assert [finding.problem for finding in found] == [DEVICES]
    means, variances = (
        np.stack([a.data for a in array.addressable_shards]) for array in (mean, var)
    )
    spread = np.abs(means - means[0]) / np.sqrt(variances[0] + 1e-5)
    ratio = (variances + 1e-5) / (variances[0] + 1e-5)
    assert found[0].figures == pytest.approx(
        {
            "devices": 7,
            "difference_of_means": spread.max(),
            "ratio_of_variances": max(ratio.max(), 1 / ratio.min()),
        }
    )
    same = jax.device_put((mean, var), jax.NamedSharding(mesh, everywhere))
    same = [jax.device_put(np.asarray(a), jax.NamedSharding(mesh, everywhere)) for a in same]
    assert jnnx.audit(norm_of({"mean": same[0], "var": same[1]}), x[:64]) == []
