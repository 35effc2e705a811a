"""Layers of PyTorch in Flax, with weight norm and spectral norm: all axes of one size.

So no shape tells whether the axes of a kernel are in the right order. The outputs do.
"""

import warnings
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxnorm.linen
import jaxnorm.nnx
from jaxnorm import convert

torch: Any = pytest.importorskip("torch", reason="PyTorch is in the extra 'peers'")

# Times the largest element: sums of up to 27 terms, a norm, and some ten roundings on each side.
TOL = 16 * float(np.finfo(np.float32).eps)
RNGS = nnx.Rngs(0)
POWER_STEPS = 500  # so that u is the singular vector, and its v the same in Flax as in PyTorch


def close(result, right):
    right = right.detach().numpy()
    np.testing.assert_allclose(result, right, rtol=0, atol=TOL * max(1.0, np.abs(right).max()))


def conv(dims, size=3):
    """The same convolution in both, and x without the batch."""
    kernel = (size,) * dims
    return (
        lambda: getattr(torch.nn, f"Conv{dims}d")(size, size, size),
        lambda: nnx.Conv(size, size, kernel, padding="VALID", rngs=RNGS),
        (*(size + 1,) * dims, size),
    )


def up(dims, transpose_kernel, size=3):
    """The same transposed convolution in both."""
    options: Any = {"padding": "VALID", "transpose_kernel": transpose_kernel, "rngs": RNGS}
    return (
        lambda: getattr(torch.nn, f"ConvTranspose{dims}d")(size, size, size),
        lambda: nnx.ConvTranspose(size, size, (size,) * dims, **options),
        (*(size,) * dims, size),
    )


LAYERS: dict[str, Any] = {
    "linear": (lambda: torch.nn.Linear(4, 4), lambda: nnx.Linear(4, 4, rngs=RNGS), (4,)),
    "conv-1d": conv(1),
    "conv-2d": conv(2),
    "conv-3d": conv(3, size=2),
    "up-1d": up(1, transpose_kernel=False),
    "up-2d": up(2, transpose_kernel=False),
    "up-2d-turned": up(2, transpose_kernel=True),
}


def images(rng, shape):
    return rng.standard_normal((2, *shape)).astype(np.float32)


def outputs(module, x):
    """What PyTorch computes, with its channels moved to the end."""
    if x.ndim == 2:
        return module(torch.tensor(x))
    return module(torch.tensor(x).movedim(-1, 1)).movedim(1, -1)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer(name, rng, unoptimized):
    make, make_ours, shape = LAYERS[name]
    module, x = make(), images(rng, shape)
    table = {"weight": "kernel", "bias": "bias"}
    close(convert.load(make_ours(), module.state_dict(), table)(x), outputs(module, x))


def reparametrized(kind, module):
    """A weight norm or spectral norm of PyTorch, by its older or newer names."""
    parametrizations, utils = torch.nn.utils.parametrizations, torch.nn.utils
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the older ones
        old, new = getattr(utils, kind[4:]), getattr(parametrizations, kind[4:])
        return (old if kind.startswith("old") else new)(module)


G = {"old": "weight_g", "new": "parametrizations.weight.original0"}
V = {"old": "weight_v", "new": "parametrizations.weight.original1"}
W = {"old": "weight_orig", "new": "parametrizations.weight.original"}
SINGULAR = {
    "old": ("weight_u", "weight_v"),
    "new": ("parametrizations.weight.0._u", "parametrizations.weight.0._v"),
}


@pytest.mark.parametrize("age", ["old", "new"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_weight_norm(name, age, rng, unoptimized):
    make, make_ours, shape = LAYERS[name]
    module, x = reparametrized(f"{age}_weight_norm", make()), images(rng, shape)
    with torch.no_grad():
        dict(module.named_parameters())[G[age]].uniform_(0.5, 2.0)
    # PyTorch takes the lengths along the first axis, which in a ConvTranspose are the inputs.
    features = -2 if name in ("up-1d", "up-2d") else -1
    ours = jaxnorm.nnx.WeightNorm(make_ours(), feature_axes=features, rngs=RNGS)
    table = {
        G[age]: ("scales.kernel", np.ravel),
        V[age]: "layer_instance.kernel",
        "bias": "layer_instance.bias",
    }
    close(convert.load(ours, module.state_dict(), table)(x), outputs(module, x))


@pytest.mark.parametrize("age", ["old", "new"])
# Flax's spectral norm takes the last axis for the features, which is not PyTorch's where turned.
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "up-2d-turned"])
def test_a_spectral_norm(name, age, rng, unoptimized):
    make, make_ours, shape = LAYERS[name]
    module, x = reparametrized(f"{age}_spectral_norm", make()), images(rng, shape)
    for _ in range(POWER_STEPS):
        outputs(module, x)
    module.eval()
    u, v = SINGULAR[age]
    table = {
        W[age]: "layer_instance/kernel",
        "bias": "layer_instance/bias",
        u: ("batch_stats/kernel/u", lambda u: u[None]),
        v: None,
    }
    ours = jaxnorm.nnx.SpectralNorm(make_ours(), rngs=RNGS)
    keep = "batch_stats.kernel.sigma"
    loaded = convert.load(ours, module.state_dict(), table, keep=keep)
    close(loaded(x, update_stats=False), outputs(module, x))


def test_names_of_linen_may_hold_slashes(rng):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jaxnorm.linen.WeightNorm(nn.Dense(4))(x)

    module, x = reparametrized("new_weight_norm", torch.nn.Linear(4, 4)), images(rng, (4,))
    table = {
        G["new"]: ("params/WeightNorm_0/Dense_0/kernel/scale", np.ravel),
        V["new"]: "params/Dense_0/kernel",
        "bias": "params/Dense_0/bias",
    }
    variables = Net().init(jax.random.key(0), x)
    loaded = convert.load(variables, module.state_dict(), table)
    assert jax.tree.structure(loaded) == jax.tree.structure(variables)
    close(Net().apply(loaded, x), outputs(module, x))


def test_an_embedding_and_an_lstm(rng):
    """Of 8 words; an LSTM of 2 features has 4 gates of them, so that its weights are square too."""
    embedding, lstm = torch.nn.Embedding(8, 8), torch.nn.LSTM(8, 2, batch_first=True)
    torch.nn.init.zeros_(lstm.bias_ih_l0)  # PyTorch has two biases, whose sum counts

    class Model(nnx.Module):
        def __init__(self):
            self.words = nnx.Embed(8, 8, rngs=RNGS)
            self.lstm = nnx.RNN(nnx.OptimizedLSTMCell(8, 2, rngs=RNGS))

        def __call__(self, x):
            return self.lstm(self.words(x))

    table = {
        "0.weight": "words.embedding",
        "1.weight_ih_l0": "lstm.cell.dense_i.kernel",
        "1.weight_hh_l0": "lstm.cell.dense_h.kernel",
        "1.bias_ih_l0": None,
        "1.bias_hh_l0": "lstm.cell.dense_h.bias",
    }
    model = convert.load(Model(), torch.nn.ModuleList([embedding, lstm]).state_dict(), table)
    x = rng.integers(0, 8, (2, 5))
    close(model(jnp.asarray(x)), lstm(embedding(torch.tensor(x)))[0])


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("fc.weight", "transposed"),
        ("fc/weight_ih_l0", "transposed"),
        ("attention.in_proj_weight", "transposed"),
        ("weight.kernel", "as it is"),
        ("kernel", "as it is"),
        ("linear/w", "as it is"),
        ("weights.W", "refused"),
        ("fc.lora_w", "refused"),
        ("weight.original.x", "refused"),
    ],
)
def test_a_name_tells_how_a_kernel_is_arranged(name, right):
    layer, array = nnx.Linear(2, 2, use_bias=False, rngs=RNGS), np.arange(4.0).reshape(2, 2)
    load = lambda place: convert.load(layer, {name: array}, {name: place}).kernel[...]
    if right == "refused":
        words = (
            rf"the name of an array for kernel must end in weight.*, got '{name}'; give its path"
        )
        with pytest.raises(ValueError, match=words):
            load("kernel")
        np.testing.assert_array_equal(load(("kernel", np.transpose)), array.T)
    else:
        np.testing.assert_array_equal(load("kernel"), array.T if right == "transposed" else array)
