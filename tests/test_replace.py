"""Flax's norms replaced inside models: the same variables, jaxnorm's numbers."""

import flax.linen as nn
import jax
import numpy as np
import oracle
import pytest
from flax import nnx

import jaxnorm.linen
import jaxnorm.nnx

TOL = 1e-5  # roundings of a few layers, of numbers near one


class Own(nnx.LayerNorm):
    """Somebody's norm, which may compute something else."""


class Nnx(nnx.Module):
    """All norms of Flax, and one that is used twice."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.norms = nnx.List(
            [
                nnx.BatchNorm(8, momentum=0.9, rngs=rngs),
                nnx.GroupNorm(8, num_groups=2, rngs=rngs),
                nnx.InstanceNorm(8, rngs=rngs),
                nnx.RMSNorm(8, rngs=rngs),
                nnx.LayerNorm(8, use_bias=False, rngs=rngs),
            ]
        )
        self.again = self.norms[-1]
        self.own = Own(8, rngs=rngs)

    def __call__(self, x):
        for norm in [*self.norms, self.again, self.own]:
            x = norm(x) + 0.1
        return x


class Block(nn.Module):
    """The same in linen, where two of them are given by a caller."""

    norm: type[nn.Module] = nn.BatchNorm

    @nn.compact
    def __call__(self, x, train=True):
        x = self.norm(use_running_average=not train, momentum=0.9)(x)
        x = nn.InstanceNorm()(nn.GroupNorm(num_groups=2)(x))
        x = nn.remat(nn.RMSNorm)(name="rms")(x)
        norm = nn.LayerNorm(use_bias=False)
        return norm(norm(x) + 0.1)


class OwnLinen(nn.LayerNorm):
    """Somebody's norm."""


@pytest.fixture
def x(rng):
    return (rng.standard_normal((4, 3, 3, 8)) + 1).astype(np.float32)


def test_nnx_modules_become_ours_where_they_are(x):
    theirs, model = Nnx(), Nnx()
    identity = [id(norm) for norm in model.norms]
    variables = jax.tree.leaves(nnx.state(model))
    with pytest.warns(UserWarning, match=r"stay as they are: own \(Own\); make them subclasses"):
        assert jaxnorm.nnx.replace(model) is model
    assert [id(norm) for norm in model.norms] == identity
    assert {type(norm).__module__ for norm in model.norms} == {"jaxnorm.nnx.norms"}
    assert model.again is model.norms[-1]
    assert type(model.own) is Own
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(nnx.state(model)), variables)
    np.testing.assert_allclose(model(x), theirs(x), atol=TOL)
    stats = zip(
        *(jax.tree.leaves(nnx.state(m, nnx.BatchStat)) for m in (model, theirs)), strict=True
    )
    for ours, right in stats:
        np.testing.assert_allclose(ours, right, atol=TOL)
    # Of a model that was ours from the start it differs in nothing.
    made = jaxnorm.nnx.replace(nnx.RMSNorm(8, rngs=nnx.Rngs(0)))
    graph = nnx.graphdef(jaxnorm.nnx.RMSNorm(8, rngs=nnx.Rngs(0)))
    assert jax.tree.structure(nnx.split(made)[1]) == jax.tree.structure(
        nnx.split(jaxnorm.nnx.RMSNorm(8, rngs=nnx.Rngs(0)))[1]
    )
    assert nnx.graphdef(made) == graph


def test_a_model_that_is_replaced_twice_or_compiled_or_copied(x):
    model = jaxnorm.nnx.replace(jaxnorm.nnx.replace(nnx.BatchNorm(8, rngs=nnx.Rngs(0))))
    y = nnx.jit(lambda model, x: model(x))(model, x)
    np.testing.assert_allclose(y, oracle.batch_norm(x), atol=TOL)
    assert type(nnx.clone(model)) is jaxnorm.nnx.BatchNorm
    with pytest.raises(TypeError, match="model must be an nnx module, got list"):
        jaxnorm.nnx.replace([model])  # pyright: ignore[reportArgumentType]


def test_linen_code_that_names_flax(x):
    model, key = Block(), jax.random.key(0)
    run = lambda: (
        variables := model.init(key, x),
        jax.jit(lambda v, x: model.apply(v, x, mutable=["batch_stats"]))(variables, x),
        model.apply(variables, x, False),
    )
    theirs = run()
    with jaxnorm.linen.replaced() as left:
        ours = run()
    assert left == []
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=TOL), ours, theirs)
    # Far from zero it can be seen who computed.
    far = x + np.float32(1e4)
    variables = nn.LayerNorm().init(key, far)
    right = oracle.layer_norm(far)
    with jaxnorm.linen.replaced():
        y = nn.LayerNorm().apply(variables, far)
    assert oracle.units(y, right) < 4
    assert oracle.units(nn.LayerNorm().apply(variables, far), right) > 1e3


def test_linen_subclasses_stay_and_are_listed(x):
    model = nn.Sequential([OwnLinen(), jaxnorm.linen.LayerNorm(), nn.LayerNorm()])
    with jaxnorm.linen.replaced() as left:
        variables = model.init(jax.random.key(0), x)
        model.apply(variables, x)
    assert left == [("layers_0", "OwnLinen")]
    wrong = nn.GroupNorm(num_groups=3)
    with jaxnorm.linen.replaced(), pytest.raises(ValueError, match="must be a positive integer"):
        wrong.init(jax.random.key(0), x)  # our sentence
    with pytest.raises(ValueError, match="Number of groups"):
        wrong.init(jax.random.key(0), x)  # Flax's again
