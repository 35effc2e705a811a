"""Taylor mode, `jax.experimental.jet`, against nested `jax.jvp` of plain formulas, and Flax."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adding import ADD_NORM_IDS, ADD_NORMS
from flax import linen as nn
from jax.experimental.jet import jet
from jax.typing import DTypeLike
from more_norms import FAMILY
from norms import NORMS, norm_id
from transformations import SHAPE, arguments, scalar

import jaxnorm as jn
import jaxnorm.linen

ORDER = 3
float64 = pytest.mark.usefixtures("x64", "unoptimized")
MASK = np.random.default_rng(5).random(SHAPE) < 0.7
MASK[:, 0], MASK[..., 0] = True, True
each_norm = pytest.mark.parametrize("norm", NORMS, ids=norm_id)


def real_leaves(function):
    """A function whose result is a list of its arrays, without those of integers."""

    def of_arrays(*args):
        leaves = jax.tree.leaves(function(*args))
        return [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact)]

    return of_arrays


def series_of(args, rng):
    """The first derivatives of a path through the arguments."""
    draw = lambda a: jnp.asarray(rng.standard_normal(np.shape(a)), jnp.result_type(a))
    return [[draw(a) for _ in range(ORDER)] for a in args]


def expand(function, args, series):
    """Value and derivatives along the path; for each order, a list of arrays."""
    primals, terms = jet(real_leaves(function), args, series)
    return [primals, *(list(order) for order in zip(*terms, strict=True))]


def nested(function, args, series):
    """The same by `jax.jvp` of `jax.jvp`."""

    def path(t):
        add = lambda a, terms: (
            a + sum((term * t**k / math.factorial(k) for k, term in enumerate(terms, 1)), 0 * a)
        )
        return real_leaves(function)(*map(add, args, series))

    derivatives = [path]
    for _ in range(ORDER):
        derivatives.append(lambda t, f=derivatives[-1]: jax.jvp(f, (t,), (jnp.ones_like(t),))[1])
    return jax.jit(lambda t: [f(t) for f in derivatives])(jnp.zeros((), args[0].dtype))


def assert_agrees(given, expected, dtype: DTypeLike = np.float64):
    """A term is a sum of some hundred products over up to some ten elements, rounded a few times.

    What is missing or counted twice would be of the size of the term.
    """
    for order, (ours, right) in enumerate(zip(given, expected, strict=True)):
        for a, b in zip(ours, right, strict=True):
            size = np.max(np.abs(b), initial=1e-6)
            bound = 2**12 * float(np.finfo(dtype).eps) * size
            np.testing.assert_allclose(a, b, rtol=0, atol=bound, err_msg=f"order {order}")


def check(function, args, rng, right=None):
    args = tuple(map(jnp.asarray, args))
    series = series_of(args, rng)
    assert_agrees(expand(function, args, series), nested(right or function, args, series))


@float64
@pytest.mark.parametrize("where", [None, MASK], ids=["unmasked", "masked"])
@each_norm
def test_norms(norm, where, rng):
    options = {"where": where, "epsilon": 0.01}
    ours, plain = (functools.partial(f, **options) for f in (norm, norm.plain))
    check(ours, arguments(norm, rng), rng, plain)


@float64
@each_norm
def test_rows_of_one_number_have_a_variance_of_the_second_order(norm, rng):
    _, *params = arguments(norm, rng)
    ours, plain = (functools.partial(f, epsilon=0.1) for f in (norm, norm.plain))
    check(ours, (jnp.full(SHAPE, 3.0), *params), rng, plain)


@pytest.mark.thorough
@float64
def test_sums_in_pieces(rng):
    """That is what GPUs do with a long axis, and which it is, the program chooses."""
    x = rng.standard_normal((2, 1024, 2))
    norm = NORMS[-1]
    check(norm, (x,), rng, norm.plain)


@float64
@pytest.mark.parametrize("add", ADD_NORMS, ids=ADD_NORM_IDS)
def test_norms_of_a_residual_sum(add, rng):
    check(add.of_x, arguments(add.norm, rng), rng, add.plain_of_x)


@pytest.mark.usefixtures("kernel", "x64")
@each_norm
def test_where_a_kernel_computes(norm, rng):
    args = tuple(a.astype(jnp.float32) for a in arguments(norm, rng))
    series = series_of(args, rng)
    ours = functools.partial(norm, implementation="kernel", epsilon=0.01)
    wide = jax.tree.map(lambda a: a.astype(jnp.float64), (args, series))
    right = nested(functools.partial(norm.plain, epsilon=0.01), *wide)
    assert_agrees(expand(ours, args, series), right, np.float32)


def state(rng):
    mean, var = rng.standard_normal(4), 0.5 + rng.random(4)
    return jn.BatchNormState(jnp.asarray(mean), jnp.asarray(var), jnp.zeros((), jnp.int32))


@pytest.mark.thorough
@float64
@pytest.mark.parametrize(
    "options",
    [{"where": MASK}, {"renorm": jn.Renorm(1.5, 0.5)}, {"virtual_batch_size": 4}],
    ids=lambda options: next(iter(options)),
)
def test_batch_norm_and_its_state(options, rng):
    def ours(x, scale, bias, mean):
        running = state(rng=np.random.default_rng(1))._replace(mean=mean)
        return jn.batch_norm(x, running, params=jn.NormParams(scale, bias), **options)

    check(ours, (*arguments(NORMS[0], rng), rng.standard_normal(4)), rng)


def given(function):
    def by_moments(x, scale, bias, mean, root):
        moments = jn.Moments(mean, root**2, jnp.ones(4))
        return function(x, moments, jn.NormParams(scale, bias))

    return by_moments


def evaluate(x, moments, params):
    running = jn.BatchNormState(moments.mean, moments.var, jnp.zeros((), jnp.int32))
    return jn.batch_norm(x, running, params=params, train=False)[0]


@float64
@pytest.mark.parametrize("function", [evaluate, jn.normalize, jn.denormalize])
def test_moments_that_are_given(function, rng):
    args = *arguments(NORMS[0], rng), rng.standard_normal(4), 1 + rng.random(4)
    check(given(function), args, rng)


@pytest.mark.thorough
@float64
@pytest.mark.parametrize("small", FAMILY, ids=lambda small: small.name)
def test_small_norms(small, rng):
    check(small.function, small.arguments(rng, SHAPE, np.float64), rng)


@pytest.mark.thorough
@float64
@pytest.mark.parametrize(
    "function",
    [
        jn.weight_norm,
        lambda w, _: jn.init_weight_norm(w),
        jn.standardize_weight,
        functools.partial(jn.standardize_weight, fan_in=True),
    ],
    ids=["norm", "init", "standardize", "fan-in"],
)
def test_weights(function, rng):
    check(function, (rng.standard_normal(SHAPE), rng.standard_normal(4)), rng)


@pytest.mark.thorough
@float64
@pytest.mark.parametrize("options", [{"steps": 1}, {"steps": 20}, {"train": False}], ids=str)
def test_spectral_norm(options, rng):
    w = rng.standard_normal(SHAPE)
    vectors = jn.init_spectral_norm_state(w, jax.random.key(0))
    check(lambda w: jn.spectral_norm(w, vectors, **options)[0], (w,), rng)


@float64
@pytest.mark.parametrize("where", [None, MASK], ids=["unmasked", "masked"])
def test_moments(where, rng):
    def ours(x):
        found = jn.moments(x, (0, 1), where=where)
        return jn.merge_moments(found, jn.moments(x * x, (0, 1)))

    check(ours, (rng.standard_normal(SHAPE),), rng)


@float64
def test_zeros_have_no_length_of_any_order(rng):
    x = rng.standard_normal(SHAPE)
    x[..., 1] = 0
    rest = lambda x: x.at[..., 1].set(0.0)
    right = lambda x: jn.global_response_norm(rest(x))
    check(lambda x: jn.global_response_norm(jnp.where(x[:1] == 0, 0.0, x)), (x,), rng, right)


# The rules inside each other, for the formulas and for the primitives, on which kernels are.
TRANSFORMED = {
    "jet of jit": lambda f, x, v: expand(jax.jit(f), (x,), (v,)),
    "jit of jet": lambda f, x, v: jax.jit(lambda x, v: expand(f, (x,), (v,)))(x, v),
    "jet of vmap": lambda f, x, v: expand(jax.vmap(f), (x,), (v,)),
    "vmap of jet": lambda f, x, v: jax.vmap(lambda x, v: expand(f, (x,), (v,)))(x, v),
    "jet of grad": lambda f, x, v: expand(jax.grad(lambda x: scalar(f(x))), (x,), (v,)),
    "jet of jvp": lambda f, x, v: expand(lambda x: jax.jvp(f, (x,), (x**2,))[1], (x,), (v,)),
    "jet of remat": lambda f, x, v: expand(jax.checkpoint(f), (x,), (v,)),
    "grad of jet": lambda f, x, v: [
        [jax.grad(lambda x: sum(scalar(t[0]) for t in expand(f, (x,), (v,))))(x)]
    ],
    "jet of jet": lambda f, x, v: expand(lambda x: expand(f, (x,), (v,))[2], (x,), (v,)),
}


@pytest.mark.thorough
@pytest.mark.usefixtures("kernel", "x64", "unoptimized")
@pytest.mark.parametrize("implementation", ["xla", "kernel"])
@pytest.mark.parametrize("transformed", TRANSFORMED)
@pytest.mark.parametrize("norm", NORMS[:2], ids=norm_id)
@pytest.mark.thorough
def test_transformations(norm, transformed, implementation, rng):
    dtype = {"xla": jnp.float64, "kernel": jnp.float32}[implementation]
    x = jnp.asarray(rng.standard_normal((3, *SHAPE)), dtype)
    (v,) = series_of((x,), rng)
    ours = functools.partial(norm, implementation=implementation, epsilon=0.1)
    plain = functools.partial(norm.plain, epsilon=0.1)
    if "vmap" not in transformed:
        x, v = x[0], [term[0] for term in v]
    wide = jax.tree.map(lambda a: a.astype(jnp.float64), (x, v))
    run = TRANSFORMED[transformed]
    assert_agrees(run(ours, x, v), run(plain, *wide), dtype)


@float64
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm", "BatchNorm"])
@pytest.mark.thorough
def test_modules_as_those_of_flax(name, rng):
    options = {"num_groups": 2} if name == "GroupNorm" else {}
    train = {"use_running_average": False} if name == "BatchNorm" else {}
    x = jnp.asarray(rng.standard_normal(SHAPE))
    series = series_of((x,), rng)

    def run(library):
        module = getattr(library, name)(**options)
        variables = module.init(jax.random.key(0), x, **train)
        apply = lambda x: module.apply(variables, x, mutable=["batch_stats"], **train)[0]
        return expand(apply, (x,), series)

    with jax.numpy_dtype_promotion("standard"):
        assert_agrees(run(jaxnorm.linen), run(nn))


def test_a_custom_derivative_of_jax_too():
    """In https://github.com/jax-ml/jax/issues/2431 `jet` fails for it: UnexpectedTracerError."""
    (y, terms) = jet(jax.nn.relu, (jnp.array([-1.0, 2.0]),), ([jnp.array([3.0, 4.0])],))
    assert [y.tolist(), terms[0].tolist()] == [[0.0, 2.0], [0.0, 4.0]]
