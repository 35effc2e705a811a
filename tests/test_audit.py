"""Audits of whole models, with and without faults, in linen and nnx."""

import sys
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
MOMENTUM = "momentum looks like PyTorch's"
UNTOUCHED = "running statistics were never updated"

pytestmark = pytest.mark.usefixtures("unoptimized")  # programs that run once or twice


class Model(nnx.Module):
    """Two batch norms; the one that is called first is last in the alphabet."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        init = {"kernel_init": drawn, "rngs": rngs}
        self.enter = nnx.Linear(6, 8, **init)
        self.outer = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.middle = nnx.Linear(8, 5, **init)
        self.inner = jnnx.BatchNorm(5, momentum=0.9, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=nnx.Rngs(1))

    def __call__(self, x):
        x = nnx.relu(self.outer(self.enter(x)))
        return self.drop(self.inner(self.middle(x)))


class LinenModel(nn.Module):
    """The same in linen."""

    @nn.compact
    def __call__(self, x, train):
        norm = {"use_running_average": not train, "momentum": 0.9}
        x = nn.relu(nn.BatchNorm(name="outer", **norm)(nn.Dense(8, name="enter")(x)))
        return jlinen.BatchNorm(name="inner", **norm)(nn.Dense(5, name="middle")(x))


def drawn(key, shape, dtype):
    """An initializer that compiles nothing."""
    return jnp.asarray(np.random.default_rng(shape[-1]).standard_normal(shape), dtype)


def batch(rng, examples=64, shape=(6,)):
    return jnp.asarray(3 + 2 * rng.standard_normal((examples, *shape)), jnp.float32)


def as_linen(model) -> dict[str, Any]:
    """The variables of the linen model that an nnx model has."""
    params, stats = {}, {}
    for name in ("outer", "inner"):
        norm = getattr(model, name)
        params[name] = {"scale": norm.scale[...], "bias": norm.bias[...]}
        stats[name] = {"mean": norm.mean[...], "var": norm.var[...]}
    for name in ("enter", "middle"):
        layer = getattr(model, name)
        params[name] = {"kernel": layer.kernel[...], "bias": layer.bias[...]}
    return {"params": params, "batch_stats": stats}


def both(model, x, **options) -> jlinen.Findings:
    """The findings, which are the same in both libraries."""
    found = jnnx.audit(model, x, **options)
    other = jlinen.audit(LinenModel(), as_linen(model), x, train=True, **options)
    assert list(found.norms) == list(other.norms) == ["outer", "inner"]
    for one, two in zip(found, other, strict=True):
        assert one[:3] == two[:3]
        assert one.figures == pytest.approx(two.figures, rel=1e-4)  # other programs round
    return found


@pytest.fixture(scope="module")
def settled() -> Model:
    """A model whose running statistics have settled, after many batches."""
    model, rng = Model(), np.random.default_rng(1)
    train = nnx.jit(lambda model, x: model(x))
    for _ in range(100):
        train(model, batch(rng))
    return model


def problems(findings):
    return [(finding.path, finding.problem) for finding in findings]


def test_a_sound_model(settled, rng):
    x = batch(rng)
    settled.eval()
    before = jax.tree.map(np.asarray, nnx.state(settled, nnx.Not(nnx.RngKey)))
    found = both(settled, x)
    assert found == []
    assert str(found) == "No findings in 2 batch norms, at significance 0.001."
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(settled, nnx.Not(nnx.RngKey)))
    assert settled.outer.use_running_average
    assert settled.drop.deterministic
    assert type(settled.outer) is nnx.BatchNorm
    settled.train()
    outer, seen = found.norms["outer"], np.asarray(settled.enter(x), np.float64)
    np.testing.assert_allclose(outer.batch_mean, seen.mean(0), rtol=1e-5)  # float32, several sums
    np.testing.assert_allclose(outer.batch_var, seen.var(0), rtol=1e-5)
    assert outer.examples == 64
    assert (np.abs(outer.mean_difference) < 0.7).all()
    assert (outer.lowest < outer.running_var).all()
    assert (outer.highest > outer.running_var).all()


def test_other_data(settled, rng):
    """Only the first norm sees them: what it returns in training mode is the same."""
    found = both(settled, 2 * batch(rng))
    assert problems(found) == [("outer", DIFFER)]
    figures = found[0].figures
    assert 6 < figures["features"] <= figures["of"] == 8
    # Four, but for 64 examples.
    assert 2 < figures["smallest_variance_ratio"] < figures["largest_variance_ratio"] < 8
    assert figures["mean_difference"] > 1
    rows = str(found).splitlines()
    assert rows[0].split() == ["batch", "norm", "problem", "effect", "figures"]
    assert rows[2].startswith(f"outer       {DIFFER}  ")
    assert f"\n{DIFFER}: Evaluation differs" in str(found)
    assert rows[-1] == "1 finding in 2 batch norms, at significance 0.001."
    assert max(map(len, rows)) <= 100


def test_other_weights(settled, rng):
    model = nnx.clone(settled)
    model.middle.kernel[...] = model.middle.kernel[...].at[:, 2].multiply(3)
    found = both(model, batch(rng))
    assert problems(found) == [("inner", DIFFER)]
    assert found[0].figures["features"] == 1
    jnnx.recalibrate(model, [x := batch(rng)])
    assert jnnx.audit(model, x) == []


def test_the_effect_is_how_far_evaluation_is_from_training(settled, rng):
    """Of the norm's own output: 4000 examples leave little to sampling."""
    x = batch(rng, 4000)
    model = nnx.clone(settled)
    model.outer.mean[...] += 0.3
    model.outer.var[...] *= 1.5
    found = both(model, x)
    assert problems(found) == [("outer", DIFFER)]
    before = np.asarray(model.enter(x), np.float64)
    outputs = [
        (before - mean) / np.sqrt(var + 1e-5)
        for mean, var in (
            (before.mean(0), before.var(0)),
            (np.asarray(model.outer.mean), np.asarray(model.outer.var)),
        )
    ]
    right = np.sqrt(np.square(outputs[1] - outputs[0]).mean())
    assert found[0].effect == found.norms["outer"].shift
    # Sampling's part, which is taken off, is about 1 / sqrt(4000) of an effect above 0.1.
    assert right > 0.1
    assert found[0].effect == pytest.approx(right, rel=0.05)
    assert f"  {found[0].effect:.2f}  " in str(found).splitlines()[2]
    assert "effect: how far" in str(found)


def test_sampling_has_no_effect(rng):
    """The means of 16 examples are a quarter of a standard deviation from the true ones."""
    norm = nnx.BatchNorm(2000, momentum=0.999, rngs=nnx.Rngs(0))
    norm.mean[...] += 0.5  # or its statistics are those of a new norm
    draw = lambda mean: jnp.asarray(mean + rng.standard_normal((16, 2000)), jnp.float32)
    # 2000 features leave about (1 / 16 + 1 / 32) sqrt(2 / 2000) of the square, whose root is 0.05.
    assert jnnx.audit(norm, draw(0.5)).norms[""].shift < 0.15
    assert jnnx.audit(norm, draw(1)).norms[""].shift == pytest.approx(0.5, abs=0.05)


def test_few_examples_tell_nothing(settled, rng):
    found = jnnx.audit(settled, 2 * batch(rng, 7))
    assert found == []
    assert "2 norms with fewer than 8 examples, too few" in str(found)
    assert np.isnan(found.norms["outer"].distance).all()
    assert jnnx.audit(settled, 2 * batch(rng, 64), significance=1e-300) == []


def test_frozen_norms_and_those_that_are_not_called(settled, rng):
    model = nnx.clone(settled)
    jnnx.freeze(model, "inner")
    model.inner.momentum = 0.1
    model.extra = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    found = jnnx.audit(model, batch(rng))
    assert list(found.norms) == ["outer", "inner", "extra"]
    assert problems(found) == [("inner", MOMENTUM), ("extra", UNTOUCHED)]
    assert "2 norms frozen or not called in training mode" in str(found)


def test_errors(settled, rng):
    x, variables = batch(rng), as_linen(settled)
    with pytest.raises(ValueError, match=r"significance must lie between 0 and 1, got 5; it is"):
        jnnx.audit(settled, x, significance=5)
    with pytest.raises(ValueError, match=r"significance must lie between 0 and 1, got 0"):
        jlinen.audit(LinenModel(), variables, x, train=True, significance=0)
    with pytest.raises(ValueError, match="must have a batch norm, got none; there is nothing"):
        jnnx.audit(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), x)
    with pytest.raises(ValueError, match="must have a batch norm, got none; there is nothing"):
        jlinen.audit(nn.PReLU(), {"params": {"negative_slope": 1.0}}, x)
    frozen = nnx.clone(settled)
    jnnx.freeze(frozen)
    with pytest.raises(ValueError, match="called in training mode, got none; unfreeze"):
        jnnx.audit(frozen, x)
    with pytest.raises(ValueError, match="called in training mode, got none; pass what"):
        jlinen.audit(LinenModel(), variables, x, train=False)
    with pytest.raises(ValueError, match="in batch_stats, got none of outer, inner; pass"):
        jlinen.audit(LinenModel(), {"params": variables["params"]}, x, train=True)
    with pytest.raises(TypeError, match="must be an nnx module, got PReLU; of a linen model"):
        jnnx.audit(nn.PReLU(), x)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="variables must be what init returns, got ArrayImpl"):
        jlinen.audit(LinenModel(), x)  # pyright: ignore[reportArgumentType]


def test_the_figure(settled, rng, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is in the extra 'examples'")
    found = jnnx.audit(settled, 20 * batch(rng))
    figure = jnnx.plot_audit(found, tmp_path / "norms.png")
    assert (tmp_path / "norms.png").read_bytes().startswith(b"\x89PNG")
    left, right = figure.axes
    assert "in running standard deviations" in left.get_xlabel()
    assert right.get_xscale() == "log"
    labels = left.get_yticklabels()
    assert [label.get_text() for label in labels] == ["outer", "inner"]
    assert [label.get_weight() for label in labels] == ["bold", "normal"]
    assert left.get_ylim() == (1.5, -0.5)  # the first norm is above
    features = sum(len(line.get_xdata()) for line in right.lines if line.get_marker() == "|")
    assert features == 8 + 5
    low, high = right.get_xlim()
    ratio = found.norms["outer"].variance_ratio
    assert low < ratio.min() < ratio.max() < high


def test_a_figure_needs_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "jaxnorm.tools.audit_figure", raising=False)
    with pytest.raises(
        ImportError, match="plot_audit must have matplotlib, which is not installed"
    ):
        jnnx.plot_audit(jnnx.Findings([], {}, 0.001))
