"""Norms and models of PyTorch, Keras and Haiku in jaxnorm, and norms back in PyTorch."""

import os
import subprocess
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx

import jaxnorm as jn
from jaxnorm import convert

EPS = float(np.finfo(np.float32).eps)
# Times the largest element: each of the two rounds some ten times, and sums of up to 40 terms.
TOL = 16 * EPS
STEPS = 3


def test_importing_it_imports_nothing_else():
    others = "{'flax', 'haiku', 'keras', 'torch'}"
    code = f"import sys, jaxnorm; assert 'jaxnorm.convert' not in sys.modules; \
import jaxnorm.convert; sys.exit(bool({others} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture
def torch():
    torch = pytest.importorskip("torch", reason="PyTorch is in the extra 'peers'")
    torch.manual_seed(0)
    return torch


@pytest.fixture
def keras(monkeypatch) -> Any:
    monkeypatch.setenv("KERAS_BACKEND", os.environ.get("KERAS_BACKEND", "jax"))
    return pytest.importorskip("keras", reason="Keras is in the extra 'benchmarks'")


def close(result, right):
    right = np.asarray(right, np.float64)
    np.testing.assert_allclose(result, right, rtol=0, atol=TOL * max(1.0, np.abs(right).max()))


def batches(rng, shape):
    """What three steps of training see."""
    return [(2 * rng.standard_normal(shape) + 1).astype(np.float32) for _ in range(STEPS)]


NORMS = {
    "batch-1d": ((8, 4), lambda nn: nn.BatchNorm1d(4)),
    "batch-2d": ((5, 4, 3, 2), lambda nn: nn.BatchNorm2d(4, eps=1e-3, momentum=0.3)),
    "batch-average": ((8, 4), lambda nn: nn.BatchNorm1d(4, momentum=None)),
    "batch-plain": ((8, 4), lambda nn: nn.BatchNorm1d(4, affine=False)),
    "layer-no-arrays": ((5, 4), lambda nn: nn.LayerNorm(4, elementwise_affine=False)),
    "instance-no-arrays": ((5, 4, 3, 2), lambda nn: nn.InstanceNorm2d(4)),
    "layer": ((5, 4, 3), lambda nn: nn.LayerNorm((4, 3))),
    "layer-no-bias": ((5, 4), lambda nn: nn.LayerNorm(4, bias=False)),
    "rms": ((5, 4), lambda nn: nn.RMSNorm(4)),
    "rms-eps": ((5, 4), lambda nn: nn.RMSNorm(4, eps=0.1)),
    "group": ((5, 4, 3, 2), lambda nn: nn.GroupNorm(2, 4)),
    "instance": ((5, 4, 3, 2), lambda nn: nn.InstanceNorm2d(4, affine=True)),
    "instance-running": (
        (5, 4, 3, 2),
        lambda nn: nn.InstanceNorm2d(4, affine=True, momentum=0.3, track_running_stats=True),
    ),
}


def randomized(module):
    """With the arrays of a norm that has seen something, and 5 batches."""
    from torch.nn import init

    for parameter in module.parameters():
        init.normal_(parameter)
    if getattr(module, "running_mean", None) is not None:
        init.normal_(module.running_mean)
        init.uniform_(module.running_var, 0.5, 2.0)
        module.num_batches_tracked += 5
    return module


def step(name, module, x, params, state):
    """A training step of ours, and the state after it."""
    options = convert.torch_options(module)
    match name.partition("-")[0]:
        case "batch":
            return jn.batch_norm(x, state, params=params, **options)
        case "instance" if state is not None:  # as the docstring of torch_options has it
            own = jn.moments(x, (2, 3))
            moments = jn.Moments(own.mean.mean(0), own.var.mean(0), own.count[0])
            momentum = 1 - module.momentum
            state = jn.update_batch_norm_state(state, moments, momentum=momentum, ddof=1)
    function = getattr(jn, f"{name.partition('-')[0]}_norm")
    return function(x, params, **options), state


@pytest.mark.parametrize("name", NORMS)
def test_steps_of_training_are_pytorchs(name, rng, torch):
    shape, make = NORMS[name]
    module = randomized(make(torch.nn))
    params, state = convert.from_torch(module.state_dict())
    assert (state is None) == ("running_mean" not in module.state_dict())
    for x in batches(rng, shape):
        y, state = step(name, module, x, params, state)
        close(y, module(torch.tensor(x)).detach())
    # Back in a new module: the same arrays, and in evaluation the same result.
    new = make(torch.nn)
    saved = {key: torch.from_numpy(a) for key, a in convert.to_torch(params, state).items()}
    new.load_state_dict(saved, strict=True)
    for key, tensor in module.state_dict().items():
        if (name, key) != ("instance-running", "num_batches_tracked"):  # PyTorch leaves it at 5
            close(new.state_dict()[key], tensor)
    if state is not None:
        x = rng.standard_normal(shape).astype(np.float32)
        options = {"epsilon": module.eps, "feature_axis": 1, "train": False}
        y, _ = jn.batch_norm(x, state, params=params, **options)
        close(y, new.eval()(torch.tensor(x)).detach())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_conversion_is_a_copy_in_the_same_dtype(dtype, torch):
    norm = randomized(torch.nn.BatchNorm1d(64)).to(getattr(torch, jnp.dtype(dtype).name))
    before = norm.weight.detach().float().numpy().copy()
    model = torch.nn.ModuleDict({"a": norm})
    params, state = convert.from_torch(model.state_dict(), "a.")
    assert params.scale is not None
    assert state is not None
    assert (params.scale.dtype, state.mean.dtype) == (dtype, jnp.float32)
    saved = convert.to_torch(params, state, "a")
    assert set(saved) == set(model.state_dict())

    def zeroed(array):
        array[:] = 0
        return array

    layer = nnx.Linear(2, 64, rngs=nnx.Rngs(0))
    table = {"weight": ("bias", zeroed)}
    convert.load(layer, {"weight": norm.weight}, table, keep=("kernel",))
    np.testing.assert_array_equal(norm.weight.detach().float().numpy(), before)
    with torch.no_grad():
        norm.weight.zero_()  # does not change what was converted
    np.testing.assert_array_equal(params.scale.astype(jnp.float32), before)
    model.load_state_dict({key: torch.from_numpy(a) for key, a in saved.items()}, strict=True)
    np.testing.assert_array_equal(norm.weight.detach().float().numpy(), before)
    saved["a.weight"][:] = 0  # nor does this
    np.testing.assert_array_equal(params.scale.astype(jnp.float32), before)


ONES = np.ones(2, np.float32)
SAVED = {"conv.weight": np.ones((2, 3)), "layer.bn.weight": ONES, "layer.bn.bias": jnp.ones(2)}
STATE = {"bn.weight": ONES, "bn.running_mean": ONES, "bn.running_var": ONES}


@pytest.mark.parametrize(
    ("saved", "prefix", "error", "words"),
    [
        (SAVED, "bn", ValueError, r"got 'bn'; the prefixes there are 'conv', 'layer\.bn'; "),
        (SAVED, "layer", ValueError, "got 'layer'; the prefixes"),
        (SAVED, "", ValueError, "got ''; the prefixes"),
        ({"a.in_proj": ONES}, "a", ValueError, "or neither, got 'a' with 'in_proj'"),
        ({"bn.running_mean": ONES}, "bn", ValueError, "or neither, got 'bn' with 'running_mean'"),
        (STATE | {"bn.weight": np.ones((2, 1))}, "bn", ValueError, r"one shape, got \[\(2,\), \(2, "
         ),
        ({"weight": "ones"}, "", TypeError, "weight must be an array of numbers, got str"),
        ({f"n{i}.weight": ONES for i in range(50)}, "m7", ValueError, "'n7'.* and 30 more"),
    ],
)  # fmt: skip
def test_what_is_no_norm_of_pytorch(saved, prefix, error, words):
    with pytest.raises(error, match=words):
        convert.from_torch(saved, prefix)


NO_NORMS = {
    "linear": lambda nn: nn.Linear(4, 3),
    "linear without bias": lambda nn: nn.Linear(4, 3, bias=False),
    "square linear without bias": lambda nn: nn.Linear(4, 4, bias=False),
    "embedding": lambda nn: nn.Embedding(4, 3),
    "convolution without bias": lambda nn: nn.Conv2d(4, 4, 3, bias=False),
    "bilinear": lambda nn: nn.Bilinear(2, 3, 4),
    "lstm": lambda nn: nn.LSTM(4, 4),
    "attention": lambda nn: nn.MultiheadAttention(4, 2),
    "weight norm": lambda nn: nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)),
    "weight norm without bias": lambda nn: nn.utils.parametrizations.weight_norm(
        nn.Linear(4, 4, bias=False)
    ),
    "spectral norm": lambda nn: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
    "spectral norm, older": lambda nn: nn.utils.spectral_norm(nn.Linear(4, 4)),
    "a norm and more": lambda nn: nn.TransformerEncoderLayer(4, 2, 8).self_attn,
}


@pytest.mark.parametrize("prefix", ["", "layer"])
@pytest.mark.parametrize("name", NO_NORMS)
@pytest.mark.filterwarnings("ignore:.*spectral_norm:FutureWarning")  # of the older one
def test_layers_of_pytorch_are_no_norms(name, prefix, torch):
    layer = NO_NORMS[name](torch.nn)
    saved = (torch.nn.ModuleDict({"layer": layer}) if prefix else layer).state_dict()
    with pytest.raises(ValueError, match=rf"'{prefix}'.*; "):
        convert.from_torch(saved, prefix)


def test_a_norm_without_arrays_is_not_a_wrong_prefix():
    assert convert.from_torch({}) == (jn.NormParams(), None)
    for saved in ({}, SAVED):
        with pytest.raises(ValueError, match=r"got 'm'.*without arrays has none, so take NormPar"):
            convert.from_torch(saved, "m")
    with pytest.raises(ValueError, match=r"got one of shape \(2, 3\) by itself at 'conv'"):
        convert.from_torch(SAVED, "conv")


def test_state_dicts_without_a_count():
    _, state = convert.from_torch(STATE, "bn")
    assert state is not None
    assert int(state.count) == 0
    with pytest.raises(TypeError, match=r"params must be a NormParams or None.*got dict and None"):
        convert.to_torch({})  # pyright: ignore[reportArgumentType]


def test_modules_that_compute_something_else(torch):
    class Another(torch.nn.LayerNorm):
        def forward(self, x):
            return super().forward(x) + 1

    with pytest.raises(TypeError, match="what LayerNorm does, got Another, whose forward"):
        convert.torch_options(Another(3))
    with pytest.raises(TypeError, match=r"one of BatchNorm, LayerNorm.*got Linear"):
        convert.torch_options(torch.nn.Linear(3, 3))
    assert convert.torch_options(torch.nn.SyncBatchNorm(3))["ddof"] == 1
    for dtype in (torch.bfloat16, torch.float64):
        norm = torch.nn.RMSNorm(4, dtype=dtype)
        x = torch.full((1, 4), 1e-5, dtype=dtype)
        small = x.double().numpy()
        right = oracle.rms_norm(small, epsilon=convert.torch_options(norm)["epsilon"])
        # bfloat16 rounds to 8 bits.
        np.testing.assert_allclose(norm(x).detach().double().numpy(), right, rtol=2**-8)


LAYERS = {
    "batch": ((8, 3, 4), lambda keras: keras.layers.BatchNormalization(momentum=0.7)),
    "batch-first": (
        (8, 4, 3),
        lambda keras: keras.layers.BatchNormalization(axis=1, scale=False, momentum=0.7),
    ),
    "layer": ((5, 4, 3), lambda keras: keras.layers.LayerNormalization(axis=(1, 2))),
    # Keras keeps arrays of shape (3, 4) here, and reshapes them to (4, 3).
    "layer-both-ends": ((5, 4, 3, 2), lambda keras: keras.layers.LayerNormalization(axis=[1, -2])),
    "layer-not-neighbours": (
        (5, 4, 3, 2),
        lambda keras: keras.layers.LayerNormalization(axis=[-1, 1], center=False),
    ),
    "rms-many": ((5, 4, 3), lambda keras: keras.layers.RMSNormalization(axis=[-1, -2])),
    "rms": ((5, 4), lambda keras: keras.layers.RMSNormalization()),
    "group": ((5, 3, 4), lambda keras: keras.layers.GroupNormalization(2)),
    "group-instance": ((5, 3, 4), lambda keras: keras.layers.GroupNormalization(-1, center=False)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_steps_of_training_are_those_of_keras(name, rng, keras):
    shape, make = LAYERS[name]
    layer = make(keras)
    with pytest.raises(ValueError, match="the layer must be built, got"):
        convert.from_keras(layer)
    layer.build(shape)
    for variable in layer.variables:
        variable.assign(0.5 + rng.random(variable.shape))
    params, state = convert.from_keras(layer)
    options = convert.keras_options(layer)
    assert (state is None) == (name[:5] != "batch")
    for x in batches(rng, shape):
        if state is None:
            y = getattr(jn, f"{name.partition('-')[0]}_norm")(x, params, **options)
            with jax.numpy_rank_promotion("allow"):  # which Keras needs
                expected = layer(x)
            close(y, expected)
        else:
            y, state = jn.batch_norm(x, state, params=params, **options)
            close(y, layer(x, training=True))
    if state is not None:
        close(state.mean, layer.moving_mean.value)
        close(state.var, layer.moving_variance.value)


def test_layers_of_keras_that_compute_something_else(keras):
    class Another(keras.layers.LayerNormalization):
        def call(self, inputs):
            return super().call(inputs) + 1

    renorm = keras.layers.BatchNormalization(renorm=True)
    for layer, error, words in (
        (Another(), TypeError, "got Another, whose call is its own"),
        (keras.layers.Dense(3), TypeError, "must be one of BatchNormalization.*got Dense"),
        (renorm, ValueError, "renorm must be False"),
    ):
        layer.build((8, 3))
        for function in (convert.from_keras, convert.keras_options):
            with pytest.raises(error, match=words):
                function(layer)


def test_steps_of_training_are_haikus(rng):
    """From the first step on, and from one of the middle, with its debiased averages."""
    hk: Any = pytest.importorskip("haiku", reason="Haiku is in the extra 'benchmarks'")

    def network(x, is_training):
        norm = hk.BatchNorm(True, True, decay_rate=0.8, eps=1e-3, name="norm")
        return hk.LayerNorm(-1, True, False)(norm(x, is_training))

    pure = hk.without_apply_rng(hk.transform_with_state(network))
    xs = batches(rng, (6, 3, 4))
    variables, theirs = pure.init(jax.random.key(0), xs[0], is_training=True)
    variables["norm"] = {
        key: jnp.asarray(rng.random(a.shape), jnp.float32) for key, a in variables["norm"].items()
    }
    params, state = convert.from_haiku(variables, theirs, "norm")
    layer, nothing = convert.from_haiku(variables, theirs, "layer_norm")
    assert nothing is None
    assert layer.bias is None
    assert state is not None
    for count, x in enumerate(xs):
        momentum = convert.haiku_momentum(0.8, state.count)
        y, state = jn.batch_norm(x, state, params=params, momentum=momentum, epsilon=1e-3)
        expected, theirs = pure.apply(variables, theirs, x, is_training=True)
        close(jn.layer_norm(y, layer, epsilon=1e-5), expected)
        converted = convert.from_haiku(variables, theirs, "norm")[1]
        assert converted is not None
        assert int(converted.count) == int(state.count) == count + 1
        # Haiku subtracts the squared mean of some 1 from the mean square.
        jax.tree.map(close, state, converted)
    y, _ = jn.batch_norm(xs[0], state, params=params, epsilon=1e-3, train=False)
    expected, _ = pure.apply(variables, theirs, xs[0], is_training=False)
    close(jn.layer_norm(y, layer, epsilon=1e-5), expected)
    with pytest.raises(ValueError, match="got 'nrm'; there are 'layer_norm', 'norm'"):
        convert.from_haiku(variables, theirs, "nrm")


def test_haikus_momentum_is_right_for_many_steps():
    decay, counts = 0.999, np.arange(0, 20000, 37)
    right = decay * (1 - decay**counts) / (1 - decay ** (counts + 1))
    # In float32 by Haiku's own formula, 1 - 0.999**1 has an error of some 60 units.
    assert oracle.units(convert.haiku_momentum(decay, jnp.asarray(counts)), right) < 2
    assert float(convert.haiku_momentum(0.0, 7)) == 0
    with pytest.raises(ValueError, match=r"decay_rate must lie in \[0, 1\), got 1"):
        convert.haiku_momentum(1.0, 7)


class Model(nnx.Module):
    """Convolutions in both directions, whose transposed kernels are square."""

    def __init__(self, rngs=None):
        rngs = rngs or nnx.Rngs(0)
        options: Any = {"kernel_init": nnx.initializers.zeros, "rngs": rngs}
        self.conv = nnx.Conv(2, 4, (2, 3), feature_group_count=2, padding="VALID", **options)
        self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
        self.ups = nnx.List(
            nnx.ConvTranspose(
                4, 4, (2, 3), (2, 2), padding="VALID", transpose_kernel=turned, **options
            )
            for turned in (False, True)
        )
        self.drop = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
        self.head = nnx.Linear(4, 4, **options)

    def __call__(self, x):
        x = self.norm(self.conv(x))
        for up in self.ups:
            x = up(x)
        return self.head(self.drop(x))


NAMES = ("conv", "bn", "ups.0", "ups.1", "head")
TABLE = {
    f"{name}.{key}": f"{name.replace('bn', 'norm')}.{'scale' if name == 'bn' else 'kernel'}"
    if key == "weight"
    else f"{name}/bias".replace("bn", "norm")
    for name in NAMES
    for key in ("weight", "bias")
} | {"bn.running_mean": "norm.mean", "bn.running_var": "norm.var", "bn.num_batches_tracked": None}


def torch_model(torch):
    module = torch.nn.Module()
    module.conv = torch.nn.Conv2d(2, 4, (2, 3), groups=2)
    module.bn = randomized(torch.nn.BatchNorm2d(4)).eval()
    module.ups = torch.nn.ModuleList(
        torch.nn.ConvTranspose2d(4, 4, (2, 3), stride=2) for _ in range(2)
    )
    module.head = torch.nn.Linear(4, 4)
    return module


def test_a_whole_model_is_pytorchs(rng, torch, unoptimized):
    module = torch_model(torch)
    x = rng.standard_normal((1, 3, 4, 2)).astype(np.float32)
    y = module.bn(module.conv(torch.tensor(x).movedim(-1, 1)))
    for up in module.ups:
        y = up(y)
    expected = module.head(y.movedim(1, -1)).detach().numpy()
    model = Model()
    before = jax.tree.map(np.asarray, nnx.state(model, nnx.Not(nnx.RngState)))
    loaded = convert.load(model, module.state_dict(), TABLE)
    close(loaded(x), expected)
    after = jax.tree.map(np.asarray, nnx.state(model, nnx.Not(nnx.RngState)))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    # A model without arrays takes them, in the dtypes of its variables.
    abstract = nnx.eval_shape(lambda: jax.tree.map(lambda a: a, Model()))
    filled = convert.load(abstract, module.state_dict(), TABLE)
    np.testing.assert_array_equal(filled.ups[0].kernel[...], loaded.ups[0].kernel[...])


def test_variables_of_linen_are_pytorchs(rng, torch, unoptimized):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            boxed = nn.with_partitioning(nn.initializers.zeros, (None, "model"))
            x = nn.Dense(4, kernel_init=boxed, name="fc", param_dtype=jnp.bfloat16)(x)
            x = nn.BatchNorm(use_running_average=True, name="bn")(x)
            zeros = nn.initializers.zeros
            return nn.ConvTranspose(4, (3,), padding="VALID", kernel_init=zeros, name="up")(x)

    fc, bn = torch.nn.Linear(3, 4), randomized(torch.nn.BatchNorm1d(4))
    up = torch.nn.ConvTranspose1d(4, 4, 3)
    module = torch.nn.ModuleDict({"fc": fc, "bn": bn.eval(), "up": up})
    module.fc.to(torch.bfloat16).float()  # what bfloat16 holds
    x = rng.standard_normal((2, 5, 3)).astype(np.float32)
    expected = up(bn(fc(torch.tensor(x)).movedim(-1, 1))).movedim(1, -1).detach().numpy()
    with jax.numpy_dtype_promotion("standard"):  # Flax promotes
        variables = Net().init(jax.random.key(0), x)
    flipped = lambda weight: np.flip(weight.transpose(2, 0, 1), 0)
    table = {
        "fc.weight": "params/fc/kernel",
        "fc.bias": "params/fc/bias",
        "bn.weight": "params/bn/scale",
        "bn.bias": "params/bn/bias",
        "bn.running_mean": "batch_stats/bn/mean",
        "bn.running_var": "batch_stats/bn/var",
        "bn.num_batches_tracked": None,
        "up.weight": ("params/up/kernel", flipped),
        "up.bias": "params/up/bias",
    }
    loaded = convert.load(variables, module.state_dict(), table)
    kernel = loaded["params"]["fc"]["kernel"]
    assert isinstance(kernel, nn.Partitioned)
    assert kernel.value.dtype == jnp.bfloat16
    with jax.numpy_dtype_promotion("standard"):
        close(Net().apply(loaded, x), expected)


def test_a_linear_layer_is_no_norm():
    linear = {"fc.weight": np.ones((2, 3)), "fc.bias": np.ones(2)}
    with pytest.raises(ValueError, match=r"must have one shape, got \[\(2,\), \(2, 3\)\] at 'fc'"):
        convert.from_torch(linear, "fc")
    with pytest.raises(TypeError, match="state_dict must be a dictionary of arrays"):
        convert.from_torch([linear], "fc")  # pyright: ignore[reportArgumentType]


def test_safetensors_files_are_read_by_their_library(tmp_path):
    safetensors = pytest.importorskip(
        "safetensors.numpy", reason="safetensors is in the extra 'peers'"
    )
    safetensors.save_file(STATE, tmp_path / "bn.safetensors")
    params, state = convert.from_torch(safetensors.load_file(tmp_path / "bn.safetensors"), "bn")
    assert state is not None
    np.testing.assert_array_equal(params.scale, state.var)


WEIGHT, BIAS = np.ones((2, 3), np.float32), np.ones(2, np.float32)
PLACES: dict[str, Any] = {"weight": "kernel", "bias": "bias"}


@pytest.mark.parametrize(
    ("arrays", "table", "keep", "error", "words"),
    [
        ({}, PLACES | {"gamma": None}, (), ValueError,
         "table must name arrays that are there, got 'gamma'; there are 'bias', 'weight'"),
        ({}, PLACES | {"bias": "bais"}, (), ValueError,
         "paths of the model's variables, got 'bais'; there are 'bias', 'kernel'"),
        ({}, PLACES | {"bias": "kernel"}, (), ValueError, "used once, got 'kernel' more"),
        ({}, PLACES, ("bias",), ValueError, "used once, got 'bias' more"),
        ({"count": BIAS}, PLACES, (), ValueError,
         "a place for every array, got none for 'count'"),
        ({}, PLACES | {"bias": None}, (), ValueError,
         "fill every variable of the model, got nothing for 'bias'"),
        ({}, PLACES, ("head",), ValueError, "keep must hold paths in the model, got 'head'"),
        ({"weight": WEIGHT.T, "bias": WEIGHT}, PLACES, (), ValueError,
         r"weight of shape \(3, 2\) \(arranged as \(2, 3\)\) for kernel of shape \(3, 2\); bias of "
         r"shape \(2, 3\) for bias of shape \(2,\)"),
        ({"bias": BIAS + 0j}, PLACES, (), TypeError, "bias must be of a dtype that holds bias"),
    ],
)  # fmt: skip
def test_nothing_is_loaded_by_a_wrong_table(arrays, table, keep, error, words):
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    kernel = model.kernel[...]
    with pytest.raises(error, match=words):
        convert.load(model, {"weight": WEIGHT, "bias": BIAS} | arrays, table, keep=keep)
    assert model.kernel[...] is kernel


def test_what_is_left_out_on_purpose():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    model.bias[...] = model.bias[...] + 7  # pyright: ignore[reportOptionalSubscript]
    # The name ends in kernel, so it is Flax's own layout.
    arrays, table = {"kernel": WEIGHT.T, "bias": BIAS}, {"kernel": "kernel", "bias": None}
    loaded = convert.load(model, arrays, table, keep=("bias",))
    np.testing.assert_array_equal(loaded.bias[...], 7 * BIAS)  # pyright: ignore
    np.testing.assert_array_equal(loaded.kernel[...], WEIGHT.T)
    wrong: Any = [nnx.Linear, WEIGHT]
    for other in wrong:
        with pytest.raises(TypeError, match="model must be an nnx module or the variables"):
            convert.load(other, arrays, table)
