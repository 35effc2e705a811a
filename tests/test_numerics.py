"""Accuracy: each output and gradient, on each kind of data, as docs/numerics.md says.

The kinds of data, the libraries and the truth, NumPy in float64, are those of docs/numerics.py. A
bound is twice the error that the page prints, for other machines, whose vectors add in another
order; no bound comes from another library.
"""

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from numerics import KINDS, PEERS, measure

from jaxnorm.core.layouts import moments_layout

PAGE = (Path(__file__).parent.parent / "docs" / "numerics.md").read_text()
OURS = ["jaxnorm", "jaxnorm (XLA)"]


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


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("peer", OURS)
def test_at_most_twice_the_error_that_the_page_prints(norm, kind, peer, request):
    if peer == "jaxnorm":
        request.getfixturevalue("kernel")
    y, gradients = printed(norm)[kind, peer]
    errors = measure(PEERS[peer], norm, KINDS[kind])
    assert errors.pop("y") <= 2 * y
    assert max(errors.values()) <= 2 * gradients


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
