"""Accuracy: at most four units in each output and gradient, on each kind of data.

The kinds of data, the libraries and the truth, NumPy in float64, are those of docs/numerics.py. The
numbers on the page are those of one machine, and bound nothing. `.ci/run` also runs this file with
the instructions of older processors and with other numbers of threads.
"""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from norms import NORMS
from numerics import KINDS, PEERS, measure

import jaxnorm as jn
from jaxnorm.core.layouts import moments_layout

PAGE = (Path(__file__).parent.parent / "docs" / "numerics.md").read_text()
OURS = ["jaxnorm", "jaxnorm (XLA)"]
IMPLEMENTATIONS = {"kernel": PEERS["jaxnorm"], "xla": PEERS["jaxnorm (XLA)"]}


def printed(norm: str) -> dict[tuple[str, str], tuple[float, float]]:
    """The errors of y and of the gradients that the page prints, by kind of data and library."""
    section = PAGE.split(f"## {norm.capitalize()} norm:")[1].split("\n## ")[0]
    head, _, *rows = [line for line in section.splitlines() if line.startswith("|")]
    peers = re.findall(r"\| ([^|]*): y \| gradients", head)
    errors = {}
    for row in rows:
        kind, *cells = (cell.strip() for cell in row.strip("|").split("|"))
        numbers = list(map(float, cells))
        for peer, pair in zip(peers, zip(numbers[::2], numbers[1::2], strict=True), strict=True):
            errors[kind, peer] = pair
    return errors


# Units of the largest element. An element of y or dx is rounded some five times, by half a unit
# each time; the statistics are rounded to half a unit, and the formula's variance may lose three
# bits of what it adds up (`_in_one_pass` in core/moments.py). Gradients of scale and bias are sums
# of terms that were rounded three times, each time by a fifth of a unit (the standard deviation).
# Of 2**18 terms of random signs that is 180 units of a term, and the hardest of these sums is 108,
# so that it is off by 1.7. The sum itself is taken in float64: the order of its terms costs
# nothing.
BOUND = 4


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("kind", KINDS)
def test_at_most_four_units(norm, kind, implementation):
    errors = measure(IMPLEMENTATIONS[implementation], norm, KINDS[kind])
    assert max(errors.values()) <= BOUND, errors


LONG_SUMS = {
    "batch": [(2**16, 8), (2**10, 2**6, 8)],
    "layer": [(2**16, 8), (3, 2**16)],
    "rms": [(2**16, 8), (3, 2**16)],
    "group": [(2, 2**15, 8), (3, 2**16)],
    "instance": [(2**13, 8, 8), (2, 2**15, 8)],
}
ONE_AXIS = [norm for norm in NORMS if norm.options.get("axis") in (None, -1)]
CASES = [(norm, shape) for norm in ONE_AXIS for shape in LONG_SUMS[norm.name]]
IDS = [f"{norm.name}-{shape}" for norm, shape in CASES]


@pytest.mark.parametrize(("norm", "shape"), CASES, ids=IDS)
def test_long_sums_of_every_norm(norm, shape, implementation, rng):
    """The terms of all sums have a mean that is not zero, and some of the first are large."""
    drift = lambda: rng.standard_normal(shape) + np.where(rng.random(shape) < 1e-3, 30, 1)
    x, dy = (drift().astype(np.float32) for _ in range(2))
    scale, bias = rng.standard_normal((2, shape[-1])).astype(np.float32)
    y, back = jax.vjp(lambda *args: norm(*args, implementation=implementation), x, scale, bias)
    axes, divided = norm.reduction_axes(x.ndim), norm.split(oracle.wide(x))
    h = oracle.standardized(divided, axes, 1e-6, subtract_mean=norm.subtract_mean)[0].reshape(shape)
    g = norm.split(oracle.wide(dy) * scale)
    dx = oracle.gradient(divided, g, axes, 1e-6, subtract_mean=norm.subtract_mean).reshape(shape)
    others = tuple(range(x.ndim - 1))
    exact = h * scale + bias, dx, (dy * h).sum(others), dy.sum(others, dtype=float)
    assert max(map(oracle.units, (y, *back(dy)), exact)) <= BOUND


def test_long_sums_in_evaluation_of_a_function_and_of_weights(rng):
    """Gradients of scale and bias where nothing is measured, and that of the length of weights."""
    x, dy = (1 + rng.standard_normal((2**16, 8)).astype(np.float32) for _ in range(2))
    ones, state = np.ones(8, np.float32), jn.init_batch_norm_state(8)
    given = jn.Moments(state.mean, state.var, jnp.array(1.0))
    functions = {
        "batch": lambda s, b: jn.batch_norm(x, state, params=jn.NormParams(s, b), train=False)[0],
        "given": lambda s, b: jn.normalize(x, given, jn.NormParams(s, b)),
        "tanh": lambda s, b: jn.dynamic_tanh(x, 0.5, jn.NormParams(s, b)),
        "alpha": lambda s, b: jn.dynamic_tanh(x, s, jn.NormParams(None, b)),
    }
    wide = oracle.wide(x)
    h = {
        "batch": wide / np.sqrt(1 + 1e-5),
        "given": wide / np.sqrt(1 + 1e-5),
        "tanh": np.tanh(0.5 * wide),
        "alpha": wide / np.cosh(wide) ** 2,
    }
    for name, function in functions.items():
        found = jax.vjp(function, ones, ones)[1](dy)
        exact = (dy * h[name]).sum(0), dy.sum(0, dtype=float)
        assert max(map(oracle.units, found, exact)) <= BOUND, name
    v = rng.uniform(0.5, 1, (2**16, 8)).astype(np.float32)
    (found,) = jax.vjp(lambda g: jn.weight_norm(v, g), ones)[1](dy)
    exact = (dy * oracle.wide(v) / np.linalg.norm(oracle.wide(v), axis=0)).sum(0)
    assert oracle.units(found, exact) <= BOUND
    # All are below such a threshold.
    above = lambda threshold: jn.filter_response_norm(x[None], threshold=threshold)[0]
    (found,) = jax.vjp(above, 1e3 * ones)[1](dy)
    assert oracle.units(found, dy.sum(0, dtype=float)) <= BOUND


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_the_page_promises_what_the_readme_does(norm):
    """Four units for y on every kind of data, where other libraries cancel."""
    errors = printed(norm)
    assert {kind for kind, _ in errors} == set(KINDS)
    assert max(errors[kind, peer][0] for kind in KINDS for peer in OURS) <= 4
    for kind in ("mean 1e2, std 1", "mean 1e4, std 1", "mean 1e6, std 10"):
        assert max(errors[kind, peer][1] for peer in OURS) <= 4
        for other in ("flax", "torch"):
            assert min(errors[kind, other]) > 10


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_data_made_to_mislead_the_sample_costs_three_bits(norm):
    """The worst there is: 1e4 in exactly the elements of the sample, noise around 0 in all others.

    The variance is then the difference of two numbers that are 8 and 7 times as large.
    """
    shape, axis = ((64, 1024), 1) if norm == "layer" else ((1024, 64), 0)
    layout = moments_layout(shape, axis)
    place = jnp.broadcast_to(jnp.expand_dims(jnp.arange(1024.0), 1 - axis), shape)
    sampled = np.isin(np.arange(1024), np.unique(layout.sample(place)))
    assert sampled.sum() == 128

    def kind(rng, count):
        return 1e4 * sampled + rng.standard_normal((count, 1024))

    errors = measure(PEERS["jaxnorm (XLA)"], norm, kind)
    assert errors["y"] <= 2 * 8
    assert max(errors.values()) <= 2 * 8
