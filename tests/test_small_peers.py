"""The small norms beside PyTorch, Keras, and the formulas of the papers' authors."""

import importlib.util
import os
from typing import Any

import jax
import numpy as np
import pytest

import jaxnorm as jn

torch = pytest.importorskip("torch", reason="PyTorch is in the extra 'peers'")
functional = torch.nn.functional

IMAGES = (3, 4, 5, 8)
# Times the largest element: each of the two rounds some ten times, and sums of up to 60 terms.
TOL = 16 * float(np.finfo(np.float32).eps)


def grn(x, gamma, beta):
    """ConvNeXt V2's class GRN, for features last."""
    gx = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
    nx = gx / (gx.mean(dim=-1, keepdim=True) + 1e-6)
    return gamma * (x * nx) + beta + x


def frn(x, gamma, beta, tau):
    """The paper's listing."""
    nu2 = torch.mean(torch.square(x), dim=(1, 2), keepdim=True)
    return torch.maximum(gamma * (x * torch.rsqrt(nu2 + abs(1e-6))) + beta, tau)


def last(f):
    """A function of channels that come second, for channels that are last."""
    return lambda x: f(x.movedim(-1, 1)).movedim(1, -1)


CASES = {
    "unit-1": (
        lambda x: jn.unit_norm(x, ord=1),
        lambda x: functional.normalize(x, p=1, dim=-1),
        0,
    ),
    "unit-2": (jn.unit_norm, lambda x: functional.normalize(x, dim=-1), 0),
    "unit-inf": (
        lambda x: jn.unit_norm(x, ord=np.inf, axis=1),
        lambda x: functional.normalize(x, p=float("inf"), dim=1),
        0,
    ),
    "unit-epsilon": (
        lambda x: jn.unit_norm(x, epsilon=2.5),
        lambda x: functional.normalize(x, dim=-1, eps=2.5),
        0,
    ),
    "global": (
        lambda x, *params: jn.global_response_norm(x, jn.NormParams(*params)),
        grn,
        2,
    ),
    "filter": (
        lambda x, scale, bias, tau: jn.filter_response_norm(x, jn.NormParams(scale, bias), tau),
        frn,
        3,
    ),
    "tanh": (
        lambda x, alpha, *params: jn.dynamic_tanh(x, alpha, jn.NormParams(*params)),
        lambda x, alpha, weight, bias: torch.tanh(alpha * x) * weight + bias,
        3,
    ),
    "erf": (
        lambda x, alpha, shift, *params: jn.dynamic_erf(x, alpha, shift, jn.NormParams(*params)),
        lambda x, alpha, shift, weight, bias: torch.erf(alpha * x + shift) * weight + bias,
        4,
    ),
    "local": (
        lambda x: jn.local_response_norm(x, size=5, alpha=0.5, k=2.0),
        last(lambda x: functional.local_response_norm(x, 5, alpha=0.5, k=2.0)),
        0,
    ),
    # Of an even size, PyTorch has one more neighbour before, ONNX and we have it after.
    "local-even": (
        lambda x: jn.local_response_norm(x, size=4, alpha=0.5)[..., ::-1],
        last(lambda x: functional.local_response_norm(x.flip(1), 4, alpha=0.5)),
        0,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_pytorch(name, rng):
    ours, theirs, count = CASES[name]
    shapes = [IMAGES] + [IMAGES[-1:]] * count
    arrays = [rng.standard_normal(shape, np.float32) for shape in shapes]
    dy = rng.standard_normal(IMAGES, np.float32)
    y, gradients = jax.jit(lambda args, dy: (ours(*args), jax.vjp(ours, *args)[1](dy)))(arrays, dy)
    tensors = [torch.tensor(array, requires_grad=True) for array in arrays]
    expected = theirs(*tensors)
    expected.backward(torch.tensor(dy))
    wanted = [expected.detach(), *(tensor.grad for tensor in tensors)]
    for result, right in zip((y, *gradients), wanted, strict=True):
        right = right.numpy()
        np.testing.assert_allclose(result, right, rtol=0, atol=TOL * max(1, abs(right).max()))


@pytest.mark.parametrize("ord", [1, 2, np.inf])
def test_ties_and_zeros_share_the_gradient_as_in_pytorch(ord):
    x = np.array([[2.0, -2.0, 0.0, 1.0]], np.float32)
    dy = np.array([[1.0, 2.0, 3.0, 5.0]], np.float32)
    gradient = jax.vjp(lambda x: jn.unit_norm(x, ord=ord), x)[1](dy)[0]
    tensor = torch.tensor(x, requires_grad=True)
    functional.normalize(tensor, p=float(ord), dim=-1).backward(torch.tensor(dy))
    np.testing.assert_allclose(gradient, tensor.grad, atol=TOL)


def test_keras_unit_normalization(rng, monkeypatch):
    if not importlib.util.find_spec("keras"):
        pytest.skip("Keras is in the extra 'benchmarks'")
    monkeypatch.setitem(os.environ, "KERAS_BACKEND", "jax")
    import keras  # pyright: ignore[reportMissingImports] (optional)

    x = rng.standard_normal(IMAGES, np.float32)
    axes: Any = -1, (1, 2)  # Keras declares an integer
    for axis in axes:
        expected = keras.layers.UnitNormalization(axis=axis)(x)
        np.testing.assert_allclose(jn.unit_norm(x, axis=axis), expected, atol=TOL)
