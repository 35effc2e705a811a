"""PyTorch's five norms, values and gradients, on data that suits both."""

import jax
import numpy as np
import pytest
from norms import NORMS, norm_id

torch = pytest.importorskip("torch", reason="PyTorch is in the extra 'peers'")

EPSILON = 1e-5
SHAPE = (6, 10, 8)


def normalize(norm, x, scale, bias):
    """The same norm of PyTorch, whose features come second."""
    functional, channels = torch.nn.functional, x.movedim(-1, 1)
    match norm.name:
        case "layer":
            return functional.layer_norm(x, scale.shape, scale, bias, EPSILON)
        case "rms":
            return functional.rms_norm(x, scale.shape, scale, EPSILON) + bias
        case "batch":
            y = functional.batch_norm(channels, None, None, scale, bias, True, eps=EPSILON)
        case "group":
            y = functional.group_norm(channels, norm.groups, scale, bias, EPSILON)
        case _:
            y = functional.instance_norm(channels, None, None, scale, bias, eps=EPSILON)
    return y.movedim(1, -1)


@pytest.mark.parametrize("norm", NORMS, ids=norm_id)
def test_values_and_gradients(norm, rng):
    features = norm.features(SHAPE)
    shapes = SHAPE, features, features
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    dy = rng.standard_normal(SHAPE).astype(np.float32)
    y, backward = jax.vjp(lambda *args: norm(*args, epsilon=EPSILON), *arrays)
    tensors = [torch.tensor(array, requires_grad=True) for array in arrays]
    expected = normalize(norm, *tensors)
    expected.backward(torch.tensor(dy))
    # Both round sums of up to 480 terms.
    np.testing.assert_allclose(y, expected.detach(), atol=5e-6)
    for gradient, tensor in zip(backward(dy), tensors, strict=True):
        np.testing.assert_allclose(gradient, tensor.grad, atol=5e-5)
