"""Export to ONNX by jax2onnx, which replaces jax.numpy while it traces; run by onnxruntime."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jaxnorm as jn
import jaxnorm.linen
import jaxnorm.nnx

pytestmark = [
    pytest.mark.skipif(
        not (importlib.util.find_spec("jax2onnx") and importlib.util.find_spec("onnxruntime")),
        reason="jax2onnx and onnxruntime are in the extra 'export'",
    ),
    # jax2onnx asks for float64, and reads variables of Flax as one did.
    pytest.mark.filterwarnings("ignore:'.value' access is now deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Explicitly requested dtype:UserWarning"),
    pytest.mark.usefixtures("promotion"),
]
SHAPE = (2, 4, 6, 8)
RNG = np.random.default_rng(0)
X = RNG.standard_normal(SHAPE).astype(np.float32)
VECTOR = (0.5 + RNG.random(8)).astype(np.float32)
PARAMS = jn.NormParams(jnp.asarray(VECTOR), jnp.asarray(-VECTOR))
MOMENTS = jn.Moments(jnp.asarray(VECTOR), jnp.asarray(VECTOR) ** 2, jnp.ones(8))
STATE = jn.BatchNormState(MOMENTS.mean, MOMENTS.var, jnp.zeros((), jnp.int32))
MASK = RNG.random(SHAPE) < 0.7
VECTORS = jn.init_spectral_norm_state(X, jax.random.key(0))


@pytest.fixture
def promotion():
    """jax2onnx and Flax promote dtypes and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def exported(function, x, shape=None):
    """The results for x of the function that is exported for a shape, by default that of x."""
    # Not imported above: JAX is patched by it, in each process that collects tests.
    import jax2onnx  # pyright: ignore[reportMissingImports] (optional)
    import onnxruntime  # pyright: ignore[reportMissingImports] (optional)

    model = jax2onnx.to_onnx(function, [shape or x.shape], model_name="norm")
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return list(map(np.asarray, session.run(None, {session.get_inputs()[0].name: x})))


def assert_same(function, x=X):
    """Exported before it is compiled, and after, it gives the same; so does the call itself."""
    first = exported(function, x)
    expected = jax.tree.leaves(function(x))
    second = exported(function, x)
    assert len(first) == len(second) == len(expected)
    for a, b, right in zip(first, second, expected, strict=True):
        np.testing.assert_allclose(a, right, atol=1e-5 * max(1, np.max(np.abs(right))))
        np.testing.assert_array_equal(a, b)


FUNCTIONS = {
    "layer": lambda x: jn.layer_norm(x, PARAMS),
    "layer of two axes": lambda x: jn.layer_norm(x, axis=(-2, -1)),
    "layer masked": lambda x: jn.layer_norm(x, PARAMS, where=MASK),
    "rms": lambda x: jn.rms_norm(x, PARAMS, scale_offset=1.0),
    "group": lambda x: jn.group_norm(x, PARAMS, num_groups=2),
    "instance": lambda x: jn.instance_norm(x, PARAMS),
    "add layer": lambda x: jn.add_layer_norm(x, jnp.sin(x), PARAMS),
    "add rms": lambda x: jn.add_rms_norm(x, jnp.sin(x), PARAMS),
    "batch": lambda x: jn.batch_norm(x, STATE, params=PARAMS, train=False)[0],
    "batch in training": lambda x: jn.batch_norm(x, STATE, params=PARAMS)[0],
    "normalize": lambda x: jn.normalize(x, MOMENTS, PARAMS),
    "denormalize": lambda x: jn.denormalize(x, MOMENTS, PARAMS),
    "unit-1": lambda x: jn.unit_norm(x, ord=1),
    "unit-2": jn.unit_norm,
    "unit-inf": lambda x: jn.unit_norm(x, ord=np.inf),
    "global": lambda x: jn.global_response_norm(x, PARAMS),
    "filter": lambda x: jn.filter_response_norm(x, PARAMS, jnp.asarray(VECTOR)),
    "local": lambda x: jn.local_response_norm(x, size=5),
    "tanh": lambda x: jn.dynamic_tanh(x, 0.5, PARAMS),
    "erf": lambda x: jn.dynamic_erf(x, 0.5, 0.1, PARAMS),
    "weight": lambda w: jn.weight_norm(w, VECTOR),
    "standardize": lambda w: jn.standardize_weight(w, VECTOR),
    "spectral": lambda w: jn.spectral_norm(w, VECTORS, train=False)[0],
    "moments": lambda x: list(jn.moments(x, (0, 1)))[:2],
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions(function):
    assert_same(FUNCTIONS[function])


@pytest.mark.parametrize("implementation", ["xla", None])
def test_a_long_axis(implementation):
    """Its sum is taken in pieces on GPUs."""
    x = RNG.standard_normal((2, 1024, 8)).astype(np.float32)
    norm = functools.partial(jn.group_norm, num_groups=2, implementation=implementation)
    jax.jit(norm)(x)
    assert_same(norm, x)


OPTIONS = {"GroupNorm": {"num_groups": 2}, "BatchNorm": {"use_running_average": True}}
OURS = ["AddLayerNorm", "AddRMSNorm", "GlobalResponseNorm", "FilterResponseNorm", "DynamicTanh"]
FLAX = ["LayerNorm", "RMSNorm", "GroupNorm", "BatchNorm", "InstanceNorm"]


def nnx_module(library, name):
    return getattr(library, name)(8, **OPTIONS.get(name, {}), rngs=nnx.Rngs(0))


def linen_module(library, name):
    module = getattr(library, name)(**OPTIONS.get(name, {}))
    variables = module.init(jax.random.key(0), *(X, X) if name.startswith("Add") else (X,))
    return functools.partial(module.apply, variables)


def of_x(module, name):
    return (lambda x: module(x, x)) if name.startswith("Add") else module


@pytest.mark.parametrize("name", FLAX)
@pytest.mark.parametrize(
    ("make", "ours", "original"),
    [(nnx_module, jaxnorm.nnx, nnx), (linen_module, jaxnorm.linen, nn)],
    ids=["nnx", "linen"],
)
def test_modules_as_those_of_flax(make, ours, original, name):
    assert_same(of_x(make(ours, name), name))
    (theirs,) = exported(make(original, name), X)
    np.testing.assert_allclose(exported(make(ours, name), X)[0], theirs, atol=1e-5)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize(
    ("make", "ours"),
    [(nnx_module, jaxnorm.nnx), (linen_module, jaxnorm.linen)],
    ids=["nnx", "linen"],
)
def test_modules_that_flax_lacks(make, ours, name):
    assert_same(of_x(make(ours, name), name))


def test_a_model_with_a_batch_of_any_size():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Linear(8, 16, rngs=rngs),
        jaxnorm.nnx.LayerNorm(16, rngs=rngs),
        nnx.relu,
        jaxnorm.nnx.GroupNorm(16, num_groups=4, rngs=rngs),
    )
    x = np.concatenate([X, X + 1, X - 1])
    (y,) = exported(model, x, ("batch", *SHAPE[1:]))
    np.testing.assert_allclose(y, model(x), atol=1e-5)


def test_what_was_compiled_before_has_the_kernel(kernel):
    """docs/porting.md says to export the function itself, or to choose the formulas."""
    norm = jax.jit(jn.rms_norm)
    norm(X)
    with pytest.raises(NotImplementedError, match="norm_forward"):
        exported(norm, X)
    assert_same(jax.jit(functools.partial(jn.rms_norm, implementation="xla")))
