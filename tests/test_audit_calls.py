"""Audits of norms with masks, with axis names, and of stacked layers."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxnorm.linen as jlinen
import jaxnorm.nnx as jnnx

DIFFER = "batch and running statistics differ"

pytestmark = pytest.mark.usefixtures("unoptimized")  # programs that run once or twice


class Masked(nnx.Module):
    def __init__(self):
        self.norm = nnx.BatchNorm(4, axis_name="batch", rngs=nnx.Rngs(0))

    def __call__(self, x, mask):
        return self.norm(x, mask=mask)


class LinenMasked(nn.Module):
    @nn.compact
    def __call__(self, x, mask):
        norm = nn.BatchNorm(use_running_average=False, axis_name="batch", name="norm")
        return norm(x, mask=mask)


def test_masks_count_and_no_map_has_to_bind_the_axis_name(rng):
    x = np.asarray(5 + rng.standard_normal((32, 3, 4)), np.float32)
    mask = rng.random((32, 3, 1)) < 0.5
    mask[7] = False
    x[~mask[..., 0]] = 1e6
    arguments = jnp.asarray(x), jnp.asarray(mask)
    model = Masked()
    jnnx.recalibrate(model, [arguments])
    stats = {"norm": {"mean": model.norm.mean[...], "var": model.norm.var[...]}}
    variables = {"params": {"norm": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}}}
    variables["batch_stats"] = stats
    for found in (
        jnnx.audit(model, *arguments),
        jnnx.audit(model, arguments),  # as recalibrate takes them
        jlinen.audit(LinenMasked(), variables, *arguments),
        jlinen.audit(LinenMasked(), variables, arguments),
    ):
        assert found == []
        norm = found.norms["norm"]
        assert norm.examples == mask.any(1).sum() < 32
        np.testing.assert_array_equal(norm.count, mask.sum())
        counted = x[mask[..., 0]].astype(np.float64)
        np.testing.assert_allclose(norm.batch_mean, counted.mean(0), rtol=1e-6)
        np.testing.assert_allclose(norm.batch_var, counted.var(0), rtol=1e-5)


class Layers(nn.Module):
    """Three layers in one, by nn.scan."""

    @nn.compact
    def __call__(self, x):
        scanned = nn.scan(
            Layer,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=3,
        )
        return scanned(name="layers")(x, None)[0]


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = nn.Dense(4, use_bias=False, kernel_init=lambda *_: 2 * jnp.eye(4))(x)
        return nn.BatchNorm(use_running_average=False, name="norm")(x), None


def test_layers_in_one(rng):
    """Their statistics are stacked, by nn.scan and nnx.scan."""
    x = jnp.asarray(rng.standard_normal((64, 4)), jnp.float32)
    model = Layers()
    variables = model.init(jax.random.key(0), x)
    norm: Any = variables["batch_stats"]["layers"]["norm"]
    norm = {"mean": jnp.zeros((3, 4)).at[2, 1].set(5.0), "var": jnp.full((3, 4), 4.0)}
    stats = {"batch_stats": {"layers": {"norm": norm}}}
    found = jlinen.audit(model, {"params": variables["params"], **stats}, x)
    assert [finding[:2] for finding in found] == [("layers/norm", DIFFER)]
    assert found[0].figures["features"] == 1
    assert np.argwhere(found.norms["layers/norm"].means_apart).tolist() == [[2, 1]]

    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def layer(rngs):
        return nnx.BatchNorm(4, rngs=rngs)

    class Scanned(nnx.Module):
        def __init__(self):
            self.norm = layer(nnx.Rngs(0))

        def __call__(self, x):
            return nnx.scan(
                lambda x, norm: 2 * norm(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
            )(x, self.norm)

    scanned = Scanned()
    scanned.norm.mean.set_value(norm["mean"])
    scanned.norm.var.set_value(norm["var"].at[0].set(1.0))
    again = jnnx.audit(scanned, x)
    assert [finding[:2] for finding in again] == [("norm", DIFFER)]
    assert again[0].figures["features"] == 1
