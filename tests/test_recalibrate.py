"""Recalibration: exact for any division into batches; nothing else changes."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx

import jaxnorm.linen
import jaxnorm.nnx
from jaxnorm.core.moments import Moments
from jaxnorm.tools.recalibrate import add_moments, zero_total

TOL = 2e-6  # roundings of dense layers and norms of numbers near one
SIZES = 4, 7, 5  # of the batches


class Linen(nn.Module):
    """Two batch norms, of Flax and of jaxnorm."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, mask=None, *, train=True):
        options: dict[str, Any] = {"use_running_average": not train, "axis_name": self.axis_name}
        x = nn.BatchNorm(name="first", **options)(nn.Dense(4, name="dense")(x), mask=mask)
        return jaxnorm.linen.BatchNorm(name="second", **options)(x**2, mask=mask)


class Nnx(nnx.Module):
    """The same."""

    def __init__(self, rngs, axis_name=None):
        self.dense = nnx.Linear(3, 4, rngs=rngs)
        self.first = nnx.BatchNorm(4, axis_name=axis_name, rngs=rngs)
        self.second = jaxnorm.nnx.BatchNorm(4, axis_name=axis_name, rngs=rngs)

    def __call__(self, x, mask=None):
        return self.second(self.first(self.dense(x), mask=mask) ** 2, mask=mask)


@pytest.fixture
def batches(rng):
    """Batches of different sizes, means and masks."""
    draw = lambda size, mean: (2 * rng.standard_normal((size, 3)) + mean).astype(np.float32)
    arrays = [draw(size, 10 * place) for place, size in enumerate(SIZES)]
    return [(x, np.arange(len(x))[:, None] != 1) for x in arrays]


@pytest.fixture
def variables(batches):
    return Linen().init(jax.random.key(0), batches[0][0])


def nnx_model(variables, **options):
    model = Nnx(nnx.Rngs(0), **options)
    model.dense.kernel[...] = variables["params"]["dense"]["kernel"]
    return model


def truth(variables, batches, reduction):
    """What both norms saw, in float64."""
    kernel = oracle.wide(variables["params"]["dense"]["kernel"])
    first = [(oracle.wide(x) @ kernel)[mask[:, 0]] for x, mask in batches]
    standardized = [(h - h.mean(0)) / np.sqrt(h.var(0) + 1e-5) for h in first]
    for seen in (first, [h**2 for h in standardized]):
        if reduction == "pooled":
            yield np.concatenate(seen).mean(0), np.concatenate(seen).var(0)
        else:
            yield np.mean([h.mean(0) for h in seen], 0), np.mean([h.var(0) for h in seen], 0)


def check(found, right):
    """Compare statistics, the variances relative to the largest."""
    for stats, (mean, var) in zip(found, right, strict=True):
        np.testing.assert_allclose(stats["mean"], mean, atol=TOL * np.abs(mean).max())
        np.testing.assert_allclose(stats["var"], var, atol=TOL * np.abs(var).max())


def in_order(stats):
    return [stats["first"], stats["second"]]


def stats_of(model):
    norms = (model.first, model.second)
    return [{"mean": norm.mean[...], "var": norm.var[...]} for norm in norms]


@pytest.mark.parametrize("reduction", ["pooled", pytest.param("mean", marks=pytest.mark.thorough)])
def test_both_norms_have_the_moments_of_what_they_saw(variables, batches, reduction):
    right = list(truth(variables, batches, reduction))
    new = jaxnorm.linen.recalibrate(Linen(), variables, batches, reduction=reduction, train=True)
    check(in_order(new["batch_stats"]), right)
    assert new["params"] is variables["params"]
    assert jax.tree.structure(new) == jax.tree.structure(variables)
    model = nnx_model(variables)
    jaxnorm.nnx.recalibrate(model, batches, reduction=reduction)
    check(stats_of(model), right)


@pytest.mark.parametrize("reduction", ["pooled", "mean"])
def test_many_small_batches_move_what_many_elements_have(reduction):
    """Counts beyond 2**24, and steps too small for float32: five million batches after 2**29."""
    batches, size, before = 5_000_000, 32, 2**29
    moments = lambda *parts: Moments(*map(jnp.float32, parts))
    start = add_moments(zero_total(jnp.float32(0)), moments(0, 1, before), reduction)
    step = lambda _, total: add_moments(total, moments(1, 1, size), reduction)
    (mean, var, count), low = jax.jit(lambda: jax.lax.fori_loop(0, batches, step, start))()
    total = before + batches * size if reduction == "pooled" else 1 + batches
    share = batches * size / total if reduction == "pooled" else batches / total
    assert int(count) + int(low.count) == total
    # Each step has a few roundings of float32, relative to the step and not to the total.
    assert float(mean) == pytest.approx(share, rel=1e-6)
    between = share * (1 - share) if reduction == "pooled" else 0
    assert float(var) == pytest.approx(1 + between, rel=1e-6)


@pytest.mark.thorough
def test_sharded_batches_and_axis_names_give_the_same(variables, rng):
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    arrays = [rng.standard_normal((16, 3)).astype(np.float32) + place for place in range(2)]
    pairs = [(x, np.ones((16, 1), bool)) for x in arrays]
    right = list(truth(variables, pairs, "pooled"))
    sharding = jax.sharding.NamedSharding(mesh, jax.P("data"))
    sharded = [jax.device_put(x, sharding) for x in arrays]
    named = Linen("data")  # a name that nothing binds
    check(
        in_order(jaxnorm.linen.recalibrate(named, variables, sharded)["batch_stats"]),
        right,
    )
    model = nnx_model(variables, axis_name="data")
    jaxnorm.nnx.recalibrate(model, sharded)
    check(stats_of(model), right)

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=(jax.P(), jax.P("data")), out_specs=jax.P())
    def on_devices(variables, arrays):
        return jaxnorm.linen.recalibrate(named, variables, arrays)["batch_stats"]

    check(in_order(on_devices(variables, sharded)), right)


def test_evaluation_then_standardizes_all_data(variables, batches):
    whole = np.concatenate([x for x, _ in batches])
    model = nnx_model(variables)
    model.eval()
    jaxnorm.nnx.recalibrate(model, [whole])
    y = np.asarray(model(whole))
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-5)  # of numbers of up to 5
    np.testing.assert_allclose(y.var(0), 1, atol=1e-4)  # but for epsilon


def test_mean_is_update_bn_of_pytorch(variables, batches):
    torch = pytest.importorskip("torch", reason="PyTorch is in the extra 'peers'")
    arrays = [x[:4] for x, _ in batches]
    model = nnx_model(variables)
    jaxnorm.nnx.recalibrate(model, arrays, reduction="mean")

    class Square(torch.nn.Module):
        def forward(self, x):
            return x**2

    first, second = torch.nn.BatchNorm1d(4), torch.nn.BatchNorm1d(4)
    peer = torch.nn.Sequential(torch.nn.Linear(3, 4, bias=False), first, Square(), second)
    with torch.no_grad():
        peer[0].weight.copy_(torch.tensor(np.asarray(model.dense.kernel[...].T)))
        torch.optim.swa_utils.update_bn([torch.tensor(x) for x in arrays], peer)
    unbiased = 4 / 3  # n / (n - 1)
    for stats, norm in zip(stats_of(model), (first, second), strict=True):
        np.testing.assert_allclose(stats["mean"], norm.running_mean, rtol=TOL, atol=TOL)
        np.testing.assert_allclose(unbiased * stats["var"], norm.running_var, rtol=10 * TOL)


@pytest.mark.thorough
def test_modes_keys_and_failures_leave_no_trace(variables, batches):
    class Noisy(Nnx):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x, mask=None):
            return super().__call__(self.dropout(x), mask)

    def arrays(model):
        """All arrays by their paths; keys as numbers."""
        flat = jax.tree.leaves_with_path(nnx.state(model))
        plain = lambda a: (
            jax.random.key_data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a
        )
        return {jax.tree_util.keystr(path): np.asarray(plain(a)) for path, a in flat}

    def failing():
        yield batches[0]
        raise OSError("a file is missing")

    model = Noisy(nnx.Rngs(0))
    model.eval()
    before = arrays(model)
    for wrong in (failing(), [batches[0], (np.ones((4, 5), np.float32),)]):
        with pytest.raises((OSError, TypeError)):
            jaxnorm.nnx.recalibrate(model, wrong)
        jax.tree.map(np.testing.assert_array_equal, arrays(model), before)
    jaxnorm.nnx.recalibrate(model, batches)
    after = arrays(model)
    changed = [path for path, a in after.items() if not np.array_equal(a, before[path])]
    assert len(changed) == 4
    assert all("'mean'" in path or "'var'" in path for path in changed)
    assert model.dropout.deterministic
    assert model.first.use_running_average
    assert type(model.first) is nnx.BatchNorm


@pytest.mark.thorough
def test_layers_that_are_stacked_are_measured_one_by_one(batches):
    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            class Layer(nn.Module):
                @nn.compact
                def __call__(self, x, _):
                    return 2 * nn.BatchNorm(use_running_average=False, name="norm")(x) + 1, None

            stack = nn.scan(
                Layer,
                variable_axes={"params": 0, "batch_stats": 0},
                split_rngs={"params": True},
                length=2,
            )
            return stack(name="layers")(x, None)[0]

    arrays = [x for x, _ in batches]
    variables = Scanned().init(jax.random.key(0), arrays[0])
    stats: Any = jaxnorm.linen.recalibrate(Scanned(), variables, arrays)["batch_stats"]
    norm = stats["layers"]["norm"]
    right = np.concatenate([oracle.wide(x) for x in arrays])
    np.testing.assert_allclose(norm["mean"], [right.mean(0), np.ones(3)], rtol=TOL)
    np.testing.assert_allclose(norm["var"][0], right.var(0), rtol=TOL)

    @nnx.vmap(in_axes=0, out_axes=0)
    def make(key):
        return nnx.BatchNorm(3, rngs=nnx.Rngs(key))

    class Both(nnx.Module):
        def __init__(self):
            self.norms = make(jax.random.split(jax.random.key(0), 2))

        def __call__(self, x):
            return nnx.vmap(lambda norm, x: norm(x), in_axes=(0, None))(self.norms, x)

    model = Both()
    jaxnorm.nnx.recalibrate(model, arrays)
    np.testing.assert_allclose(model.norms.mean[...], [right.mean(0)] * 2, rtol=TOL)
    np.testing.assert_allclose(model.norms.var[...], [right.var(0)] * 2, rtol=TOL)


def test_a_norm_that_is_called_twice_sees_both(batches):
    class Shared(nnx.Module):
        def __init__(self):
            self.norm = jaxnorm.nnx.BatchNorm(3, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.norm(x) + self.norm(100 * x)

    model, x = Shared(), batches[0][0]
    jaxnorm.nnx.recalibrate(model, [x])
    both = np.concatenate([oracle.wide(x), 100 * oracle.wide(x)])
    np.testing.assert_allclose(model.norm.mean[...], both.mean(0), rtol=TOL)
    np.testing.assert_allclose(model.norm.var[...], both.var(0), rtol=TOL)


def test_dropout_draws_anew_for_each_batch():
    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, x, *, train):
            x = nn.Dropout(0.5, deterministic=not train)(x)
            return nn.BatchNorm(use_running_average=not train)(x)

    x, keys = np.ones((64, 3), np.float32), {"dropout": jax.random.key(1)}
    variables = Noisy().init(jax.random.key(0), x, train=False)
    one, two = (
        jaxnorm.linen.recalibrate(Noisy(), variables, [x] * count, train=True, rngs=keys)
        for count in (1, 2)
    )
    means = [new["batch_stats"]["BatchNorm_0"]["mean"] for new in (one, two)]
    assert not np.array_equal(*means)


def test_what_is_wrong_is_said(variables, batches):
    model = nnx_model(variables)
    linen = lambda *args, **options: jaxnorm.linen.recalibrate(Linen(), variables, *args, **options)
    for call in (lambda *a, **o: jaxnorm.nnx.recalibrate(model, *a, **o), linen):
        with pytest.raises(ValueError, match='reduction must be "pooled" or "mean", got \'sum\''):
            call(batches, reduction="sum")
        with pytest.raises(ValueError, match="batches must hold at least one batch, got none"):
            call([])
        with pytest.raises(TypeError, match="an iterable of batches, got ndarray; put a single"):
            call(batches[0][0])
        with pytest.raises(
            ValueError, match="finite statistics, got NaN or infinity in first, sec"
        ):
            call([*batches, (np.full((2, 3), np.nan, np.float32),)])
        with pytest.raises(ValueError, match="elements must count, got none of first, second"):
            call([(batches[0][0], np.zeros((4, 1), bool))])
    with pytest.raises(ValueError, match=r"called in training mode, .* pass what makes the model"):
        linen(batches, train=False)
    jaxnorm.nnx.freeze(model)
    with pytest.raises(ValueError, match=r"called in training mode, .* unfreeze some"):
        jaxnorm.nnx.recalibrate(model, batches)
    with pytest.raises(ValueError, match="model must have a batch norm, got none"):
        jaxnorm.nnx.recalibrate(model.dense, batches)
    with pytest.raises(TypeError, match="model must be an nnx module, got function"):
        jaxnorm.nnx.recalibrate(lambda x: x, batches)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="must be a linen module, got Nnx; of an nnx model, use"):
        jaxnorm.linen.recalibrate(model, {}, batches)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="variables must be what init returns, got list; pass it"):
        jaxnorm.linen.recalibrate(nn.BatchNorm(), batches, [])  # pyright: ignore[reportArgumentType]


def test_a_subclass_is_measured_where_it_normalizes(batches):
    x = batches[1][0]

    class Ours(jaxnorm.nnx.BatchNorm):
        def __call__(self, x):  # pyright: ignore[reportIncompatibleMethodOverride]
            return super().__call__(2 * x, use_running_average=False)

    class Flax(nnx.BatchNorm):
        def __call__(self, x, use_running_average=None, **options):
            return super().__call__(2 * x, use_running_average, **options)

    class Linen(nn.BatchNorm):
        @nn.compact
        def __call__(self, x, use_running_average=None, *, mask=None):
            return super().__call__(2 * x, use_running_average, mask=mask)

    found = []
    for kind in (Ours, Flax):
        norm = kind(3, rngs=nnx.Rngs(0))
        jaxnorm.nnx.recalibrate(norm, [x])
        assert type(norm) is kind
        found.append({"mean": norm.mean[...], "var": norm.var[...]})
    norm = Linen(use_running_average=False)
    variables = norm.init(jax.random.key(0), x)
    found.append(jaxnorm.linen.recalibrate(norm, variables, [x])["batch_stats"])
    right = 2 * oracle.wide(x)
    check(found, [(right.mean(0), right.var(0))] * 3)


def test_a_model_that_asks_for_its_mode(batches):
    class Asks(nnx.Module):
        def __init__(self):
            self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))

        def __call__(self, x, train=False):
            return self.norm(x, use_running_average=not train)

    model, x = Asks(), batches[0][0]
    jaxnorm.nnx.recalibrate(model, [x], train=True)
    np.testing.assert_allclose(model.norm.mean[...], oracle.wide(x).mean(0), rtol=TOL)
    assert not jaxnorm.nnx.audit(model, x, train=True)


def test_a_norm_that_a_scan_carries(batches):
    class Recurrent(nn.Module):
        @nn.compact
        def __call__(self, x):
            class Step(nn.Module):
                @nn.compact
                def __call__(self, x, _):
                    return nn.BatchNorm(use_running_average=False, name="norm")(x), None

            lifted: Any = {"variable_carry": "batch_stats", "variable_broadcast": "params"}
            scan = nn.scan(Step, **lifted, split_rngs={"params": False}, length=3)
            return scan(name="steps")(x, None)[0]

    x = batches[0][0]
    norm = nn.BatchNorm(use_running_average=False).init(jax.random.key(0), x)
    variables = nn.FrozenDict({name: {"steps": {"norm": norm[name]}} for name in norm})
    new = jaxnorm.linen.recalibrate(Recurrent(), variables, [x])
    assert jax.tree.structure(new) == jax.tree.structure(variables)
    # The first of three steps sees x, the others what is standardized.
    mean = new["batch_stats"]["steps"]["norm"]["mean"]
    np.testing.assert_allclose(mean, oracle.wide(x).mean(0) / 3, rtol=10 * TOL, atol=TOL)
