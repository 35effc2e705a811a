"""Frozen batch norms keep their statistics; everything else trains."""

from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from flax import nnx

import jaxnorm.linen
import jaxnorm.nnx


class Model(nnx.Module):
    """Batch norms of both libraries, at three depths."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.dense = nnx.Linear(3, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.blocks = nnx.List([jaxnorm.nnx.BatchNorm(3, rngs=rngs) for _ in range(2)])

    def __call__(self, x, use_running_average=None):
        x = self.norm(self.dense(x), use_running_average)
        for norm in self.blocks:
            x = norm(x, use_running_average)
        return x


@pytest.fixture
def x(rng):
    return (rng.standard_normal((8, 3)) + 1).astype(np.float32)


def moved(model, x, **call):
    """The paths of the batch norms that a call changes."""
    norms = {"norm": model.norm, "blocks.0": model.blocks[0], "blocks.1": model.blocks[1]}
    before = {path: np.asarray(norm.mean[...]) for path, norm in norms.items()}
    model(x, **call)
    return [path for path, norm in norms.items() if not np.array_equal(norm.mean, before[path])]


def test_frozen_norms_stay_whatever_the_mode(x):
    model = Model()
    assert jaxnorm.nnx.freeze(model) == ["blocks.0", "blocks.1", "norm"]
    model.train()
    assert moved(model, x) == []
    assert moved(model, x, use_running_average=False) == []
    assert moved(nnx.view(model, use_running_average=False), x) == []
    model.eval()
    evaluated = model(x)
    model.train()
    np.testing.assert_array_equal(model(x), evaluated)
    jaxnorm.nnx.unfreeze(model)
    assert moved(model, x) == ["norm", "blocks.0", "blocks.1"]


def test_some_are_frozen(x):
    model = Model()
    assert jaxnorm.nnx.freeze(model, "blocks") == ["blocks.0", "blocks.1"]
    assert type(model.norm) is nnx.BatchNorm  # not one of those
    assert moved(model, x) == ["norm"]
    assert jaxnorm.nnx.unfreeze(model, ["blocks.1"]) == ["blocks.1"]
    assert moved(model, x) == ["norm", "blocks.1"]
    norm = model.blocks[0]
    assert jaxnorm.nnx.freeze(norm) == [""]


def test_a_norm_in_two_places_is_found_in_both():
    model: Any = Model()
    norm = model.norm
    model.again = norm
    for place in ("again", "norm"):
        assert len(jaxnorm.nnx.freeze(model, place)) == 1
        assert norm.frozen
        jaxnorm.nnx.unfreeze(model, place)
        assert not norm.frozen
    with pytest.raises(
        TypeError, match=r"where must be a path such as .*, got 3; write an index as"
    ):
        jaxnorm.nnx.freeze(model, 3)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("with_parameters", [False, True])
def test_the_rest_trains(x, with_parameters):
    model = Model()
    frozen = jaxnorm.nnx.freeze(model)
    is_frozen = lambda path, _: ".".join(map(str, path[:-1])) in frozen
    trained = nnx.All(nnx.Param, nnx.Not(is_frozen)) if with_parameters else nnx.Param
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=trained)
    before = nnx.to_pure_dict(jax.tree.map(np.asarray, nnx.state(model)))

    @nnx.jit
    def step(model, optimizer, x):
        loss = lambda model: ((model(x) - 2) ** 2).mean()
        optimizer.update(model, nnx.grad(loss, argnums=nnx.DiffState(0, trained))(model))

    step(model, optimizer, x)
    after = nnx.to_pure_dict(nnx.state(model))
    same = jax.tree.map(np.array_equal, after, before)
    kept = {"mean": True, "var": True, "scale": with_parameters, "bias": with_parameters}
    assert same["norm"] == same["blocks"][0] == same["blocks"][1] == kept
    assert not same["dense"]["kernel"]


def test_linen_has_an_argument(x):
    class Net(nn.Module):
        frozen: bool

        @nn.compact
        def __call__(self, x, train):
            x = jaxnorm.linen.BatchNorm(use_running_average=not train, frozen=self.frozen)(x)
            return jaxnorm.linen.BatchNorm(frozen=self.frozen)(x, use_running_average=not train)

    variables = Net(False).init(jax.random.key(0), x, True)
    assert jax.tree.structure(Net(True).init(jax.random.key(0), x, True)) == jax.tree.structure(
        variables
    )
    y, updates = Net(True).apply(variables, x, True, mutable=["batch_stats"])
    jax.tree.map(np.testing.assert_array_equal, updates["batch_stats"], variables["batch_stats"])
    np.testing.assert_array_equal(y, Net(False).apply(variables, x, False))
    jaxnorm.linen.BatchNorm(frozen=True).init(jax.random.key(0), x)  # no mode is asked for


def test_what_is_wrong_is_said():
    class Own(nnx.BatchNorm):
        pass

    model = Model()
    with pytest.raises(ValueError, match=r"got 'bloks'; there are blocks.0, blocks.1, norm\."):
        jaxnorm.nnx.freeze(model, ["blocks", "bloks"])
    with pytest.raises(ValueError, match="model must have a batch norm, got none"):
        jaxnorm.nnx.freeze(model.dense)
    model.norm = Own(3, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="norm must be a BatchNorm of jaxnorm or Flax, got the sub"):
        jaxnorm.nnx.freeze(model)
    assert not any(norm.frozen for norm in model.blocks)  # nothing is half done
