"""Where today's layers lose the number: every output and gradient in units of the last place.

The kinds of input are those of docs/numerics.md, and so are the functions; the bounds are the
package's promise. Everything is compared with NumPy in float64.
"""

import pytest
from numerics import KINDS, PEERS, measure

NORM = pytest.mark.parametrize("norm", ["layer", "batch"])


@NORM
@pytest.mark.parametrize("kind", ["mean 1e2, std 1", "mean 1e4, std 1", "mean 1e6, std 10"])
def test_at_most_four_units(norm, kind):
    errors = measure(PEERS["jaxnorm"], norm, KINDS[kind])
    assert max(errors.values()) <= 4, errors


@NORM
@pytest.mark.parametrize("kind", KINDS)
def test_never_worse_than_flax(norm, kind):
    ours = measure(PEERS["jaxnorm"], norm, KINDS[kind])
    flax = measure(PEERS["flax"], norm, KINDS[kind])
    for name, error in ours.items():
        # Within four units neither is wrong; beyond, ours must not be the worse one.
        assert error <= max(4, flax[name]), (name, ours, flax)


@NORM
@pytest.mark.parametrize("kind", KINDS)
def test_never_worse_than_pytorch(norm, kind):
    pytest.importorskip("torch", reason="PyTorch is in the extra 'peers'")
    ours = measure(PEERS["jaxnorm"], norm, KINDS[kind])
    torch = measure(PEERS["torch"], norm, KINDS[kind])
    for name, error in ours.items():
        assert error <= max(4, torch[name]), (name, ours, torch)
