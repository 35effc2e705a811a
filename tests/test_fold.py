"""Batch norms folded into the layers before them, by hand and in whole nnx models."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx

import jaxnorm as jn
import jaxnorm.nnx as jnnx

EPS = float(np.finfo(np.float32).eps)
CASES = {  # the shape of a kernel, and the axis of its outputs
    "dense": ((7, 5), -1),
    "convolution": ((3, 3, 2, 5), -1),
    "transposed": ((2, 3, 5, 4), -2),
}


def draw(rng, shape, output_axis, dtype=np.float32):
    """Kernel, bias, mean, var, scale and bias of the norm."""
    outputs = shape[output_axis]
    arrays = [rng.standard_normal(size).astype(dtype) for size in (shape, *[outputs] * 5)]
    arrays[3] = arrays[3] ** 2 + dtype(0.1)
    return arrays


def fold(kernel, bias, mean, var, scale, norm_bias, **options):
    state = jn.BatchNormState(mean, var, jnp.int32(1))
    return jn.fold_batch_norm(kernel, bias, state, jn.NormParams(scale, norm_bias), **options)


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, rng):
    shape, axis = CASES[case]
    arrays = draw(rng, shape, axis)
    options = {"output_axis": axis, "epsilon": 1e-3, "scale_offset": 0.5}
    given = functools.partial(fold, **options)
    right = functools.partial(oracle.fold_batch_norm, **options)
    dy = [rng.standard_normal(size).astype(np.float32) for size in (shape, shape[axis])]
    results, gradients = jax.jit(lambda args: (given(*args), jax.vjp(given, *args)[1]((*dy,))))(
        arrays
    )
    for result, truth in zip(results, right(*arrays), strict=True):
        assert oracle.units(result, truth) < 3  # the roots, the factor and the product
    both = (oracle.cotangents(lambda *args, i=i: right(*args)[i], arrays, dy[i]) for i in (0, 1))
    for result, *truths in zip(gradients, *both, strict=True):
        assert oracle.units(result, sum(truths)) < 8  # and sums of up to 28 terms


def test_results_have_the_dtypes_of_the_layer(rng):
    kernel, bias, *norm = draw(rng, (7, 5), -1)
    half = jnp.asarray(kernel, jnp.bfloat16)
    results = fold(half, bias, *norm)
    assert [a.dtype for a in results] == [jnp.bfloat16, jnp.float32]
    folded, new = fold(half, None, *norm)
    assert new.dtype == jnp.bfloat16
    # Rounded once: as near as bfloat16 can be.
    truth = oracle.fold_batch_norm(np.asarray(half, np.float32), 0.0, *norm)
    for a, right in zip((folded, new), truth, strict=True):
        error = np.abs(np.asarray(a, np.float64) - right)
        assert (error <= (2**-8 + 4 * EPS) * np.abs(right) + 4 * EPS).all()


def test_a_norm_without_parameters(rng):
    kernel, bias, mean, var, *_ = draw(rng, (7, 5), -1)
    results = jn.fold_batch_norm(kernel, bias, jn.BatchNormState(mean, var, jnp.int32(0)))
    truth = oracle.fold_batch_norm(kernel, bias, mean, var, np.ones(5), np.zeros(5))
    for result, right in zip(results, truth, strict=True):
        assert oracle.units(result, right) < 3


def test_several_axes_of_outputs(rng):
    """Keras's depthwise kernel, whose outputs are inputs times the multiplier."""
    kernel, bias, *norm = draw(rng, (3, 3, 8), -1)
    split = lambda a: a.reshape(*a.shape[:-1], 4, 2)
    results = fold(split(kernel), *map(split, (bias, *norm)), output_axis=(-2, -1))
    for a, right in zip(results, fold(kernel, bias, *norm), strict=True):
        np.testing.assert_array_equal(a, split(right))


KERNEL, STATE = jnp.ones((7, 5)), jn.init_batch_norm_state(5)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: jn.fold_batch_norm(KERNEL, None, jn.init_batch_norm_state(7)), ValueError,
         r"state.mean must have shape \(5,\).*kernel of shape \(7, 5\), got \(7,\)"),
        (lambda: jn.fold_batch_norm(KERNEL, jnp.ones(7), STATE), ValueError, "bias must have"),
        (lambda: jn.fold_batch_norm(KERNEL, None, STATE, jn.NormParams(jnp.ones((1, 5)))),
         ValueError, r"params.scale must have shape \(5,\)"),
        (lambda: jn.fold_batch_norm(KERNEL, None, STATE, output_axis=2), ValueError,
         "output_axis must lie in"),
        (lambda: jn.fold_batch_norm(KERNEL, None, STATE, scale_offset=1.0), ValueError,
         "scale_offset must be added to a scale"),
        (lambda: jn.fold_batch_norm(KERNEL, None, STATE, epsilon=-1.0), ValueError, "epsilon must"),
        (lambda: jn.fold_batch_norm(KERNEL.astype(int), None, STATE), TypeError,
         "kernel must be floating-point"),
        (lambda: jn.fold_batch_norm(KERNEL, jnp.ones(5, int), STATE), TypeError,
         "bias must be floating-point"),
        (lambda: jn.fold_batch_norm(KERNEL, None, STATE[:2]), TypeError,  # pyright: ignore
         "state must be a BatchNormState, got tuple"),
        (lambda: jn.fold_batch_norm(KERNEL, None, STATE, {}), TypeError,  # pyright: ignore
         "params must be a NormParams or None, got dict"),
        (lambda: jn.fold_batch_norm(KERNEL, None, jn.init_batch_norm_state(5, jnp.complex64)),
         TypeError, "must be real"),
    ],
)  # fmt: skip
def test_wrong_arguments(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("layer", ["Linear", "Conv2d", "groups", "ConvTranspose2d"])
def test_pytorch_folds_to_the_same(layer):
    """Its layouts are (out, in, ...), and (in, out, ...) where it is transposed."""
    torch = pytest.importorskip("torch", reason="PyTorch is in the extra 'peers'")
    from torch.nn.utils import fusion

    torch.manual_seed(0)
    make = {
        "Linear": lambda: torch.nn.Linear(6, 4),
        "Conv2d": lambda: torch.nn.Conv2d(6, 4, 3, bias=False),
        "groups": lambda: torch.nn.Conv2d(6, 4, 3, groups=2),
        "ConvTranspose2d": lambda: torch.nn.ConvTranspose2d(6, 4, (2, 3)),
    }[layer]()
    norm = (torch.nn.BatchNorm1d if layer == "Linear" else torch.nn.BatchNorm2d)(4, eps=1e-3)
    for tensor in (norm.running_mean, norm.weight, norm.bias):
        torch.nn.init.normal_(tensor)
    torch.nn.init.uniform_(norm.running_var, 0.1, 2.0)
    transposed = layer == "ConvTranspose2d"
    if layer == "Linear":
        fused = fusion.fuse_linear_bn_eval(make.eval(), norm.eval())
    else:
        fused = fusion.fuse_conv_bn_eval(make.eval(), norm.eval(), transposed)
    array = lambda a: None if a is None else jnp.asarray(a.detach().numpy().copy())
    kernel, bias = fold(
        array(make.weight),
        array(make.bias),
        *map(array, (norm.running_mean, norm.running_var, norm.weight, norm.bias)),
        epsilon=norm.eps,
        output_axis=1 if transposed else 0,
    )
    # Each of the two rounds the root, the factor and the result.
    assert oracle.units(kernel, array(fused.weight)) < 4
    assert oracle.units(bias, array(fused.bias)) < 4


def drawn(key, shape, dtype):
    """An initializer that compiles nothing."""
    rng = np.random.default_rng(int(np.prod(shape)))
    return jnp.asarray(rng.standard_normal(shape) / 3, dtype)


def trained(norm, rng):
    """A norm whose arrays are those of no new norm."""
    for variable in (norm.mean, norm.var, norm.scale, norm.bias):
        if variable is not None:
            new = 0.5 + rng.random(variable.shape)
            variable[...] = jnp.asarray(new, variable.dtype)
    return norm


class Model(nnx.Module):
    """Layers of all kinds, in a Sequential and beside it."""

    def __init__(self, rng):
        rngs = nnx.Rngs(0)
        options: Any = {"kernel_init": drawn, "rngs": rngs}
        self.up = nnx.ConvTranspose(3, 4, (2, 3), strides=(2, 2), **options)
        self.norms = nnx.List([trained(nnx.BatchNorm(4, epsilon=1e-3, rngs=rngs), rng)])
        self.rest = nnx.Sequential(
            nnx.Conv(4, 8, (3, 3), feature_group_count=4, use_bias=False, **options),
            trained(jnnx.BatchNorm(8, scale_offset=1.0, rngs=rngs), rng),
            nnx.relu,
            nnx.ConvTranspose(8, 6, (3, 2), transpose_kernel=True, use_bias=False, **options),
            trained(nnx.BatchNorm(6, axis=3, rngs=rngs), rng),
            nnx.Dropout(0.5, rngs=rngs),
            nnx.Linear(6, 5, **options),
            trained(nnx.BatchNorm(5, use_scale=False, rngs=rngs), rng),
        )

    def __call__(self, x):
        return self.rest(self.norms[0](self.up(x)))


def kinds(model):
    return [type(module).__name__ for _, module in nnx.iter_modules(model)]


def test_a_model_says_the_same(rng, unoptimized):
    model = Model(rng)
    x = rng.standard_normal((2, 3, 2, 3)).astype(np.float32)
    before = jax.tree.map(np.asarray, nnx.state(model, nnx.Not(nnx.RngState)))
    folded = jnnx.fold(model, x)
    both = ("rest.layers.0", "rest.layers.1"), ("up", "norms.0")
    some = jnnx.fold(model, x, pairs=both)
    # The model is not changed, and trains on.
    assert kinds(model).count("BatchNorm") == 4
    assert not model.norms[0].use_running_average
    after = jax.tree.map(np.asarray, nnx.state(model, nnx.Not(nnx.RngState)))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    # Neighbours in a Sequential are found; other pairs have to be named.
    assert kinds(folded).count("FoldedNorm") == 3
    assert type(folded.norms[0]) is nnx.BatchNorm
    assert kinds(some).count("FoldedNorm") == 2
    assert type(some.norms[0]).__name__ == "FoldedNorm"
    model.eval()
    expected = np.asarray(model(x))
    for result in (folded, some):
        # Some hundred products and as many roundings of the kernels.
        np.testing.assert_allclose(result(x), expected, atol=16 * EPS * np.abs(expected).max())


def test_layers_whose_call_is_their_own_are_not_folded(rng):
    rngs, x = nnx.Rngs(0), jnp.ones((4, 3))
    norm = trained(nnx.BatchNorm(4, rngs=rngs), rng)
    model = nnx.Sequential(jnnx.StandardizedLinear(3, 4, rngs=rngs), norm)
    with pytest.raises(ValueError, match="model must have a batch norm to fold"):
        jnnx.fold(model, x)
    pairs = [("layers.0", "layers.1")]
    with pytest.raises(TypeError, match=r"layers\.0 must be Linear or Conv.*StandardizedLinear"):
        jnnx.fold(model, x, pairs=pairs)


@pytest.fixture
def small(rng):
    rngs = nnx.Rngs(0)
    return nnx.Sequential(
        nnx.Linear(3, 4, rngs=rngs),
        nnx.relu,
        trained(nnx.BatchNorm(4, rngs=rngs), rng),
        nnx.Linear(4, 4, rngs=rngs),
        trained(nnx.BatchNorm(4, axis=0, rngs=rngs), rng),
    )


def test_a_wrong_pair_is_found(small, rng):
    x = rng.standard_normal((4, 3)).astype(np.float32)
    error = (
        r"the folded model must give the outputs of the model, got a difference of [\dn].* largest"
    )
    with pytest.raises(ValueError, match=error):
        jnnx.fold(small, x, pairs=[("layers.0", "layers.2")])  # relu is between the two
    with pytest.raises(ValueError, match=error):
        jnnx.fold(small, x * jnp.nan, pairs=[("layers.0", "layers.2")])
    assert jnnx.fold(small, x, pairs=[("layers.0", "layers.2")], tolerance=1e3)
    with pytest.raises(ValueError, match=r"last axis, got axis=0"):
        jnnx.fold(small, x, pairs=[("layers.3", "layers.4")])
    with pytest.raises(ValueError, match=r"paths of modules, got 'layers\.7'; there are layers\.0"):
        jnnx.fold(small, x, pairs=[("layers.7", "layers.2")])
    with pytest.raises(ValueError, match="two paths each"):
        jnnx.fold(small, x, pairs=("layers.3", "layers.4"))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"each layer and norm once, got .layers\.0. twice"):
        jnnx.fold(small, x, pairs=[("layers.0", "layers.2")] * 2)
    with pytest.raises(ValueError, match="inputs must be given, got none"):
        jnnx.fold(small)
    with pytest.raises(TypeError, match="model must be an nnx module, got dict"):
        jnnx.fold({}, x)  # pyright: ignore[reportArgumentType]


def test_a_layer_that_is_used_twice_is_found(rng):
    rngs = nnx.Rngs(0)
    layer = nnx.Linear(3, 3, rngs=rngs)
    model = nnx.Sequential(layer, trained(nnx.BatchNorm(3, rngs=rngs), rng), layer)
    with pytest.raises(ValueError, match="neither is used twice"):
        jnnx.fold(model, rng.standard_normal((4, 3)).astype(np.float32))


def test_a_folded_norm_keeps_the_dtype_and_does_not_train(rng):
    """The norm promotes bfloat16, in which the layer computes, to float32."""
    rngs, x = nnx.Rngs(0), jnp.ones((4, 3), jnp.bfloat16)
    layer = nnx.Linear(3, 4, dtype=jnp.bfloat16, rngs=rngs)
    model = nnx.Sequential(layer, trained(nnx.BatchNorm(4, rngs=rngs), rng))
    with jax.numpy_dtype_promotion("standard"):  # Flax's norm promotes
        folded = jnnx.fold(model, x, tolerance=2**-7)  # the layer rounds to 8 bits
    assert folded(x).dtype == jnp.float32
    with pytest.raises(ValueError, match="use_running_average must be True where the norm is"):
        folded.layers[1](x, use_running_average=False)
