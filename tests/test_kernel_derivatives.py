"""Every transformation of a norm that a kernel computes, against the plain formula in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from norms import NORMS, norm_id
from transformations import (
    SHAPE,
    arguments,
    checkpoint,
    cond,
    forward_over_reverse,
    grad_of_vmap,
    gradients_of_some,
    hessian,
    hessian_vector_product,
    nested_vmap,
    per_example_gradients,
    reverse_over_forward,
    reverse_over_reverse,
    scalar,
    scan,
    vmap_of_grad,
    vmap_over_scale,
)

import jaxnorm as jn

pytestmark = pytest.mark.usefixtures("x64", "kernel")
EACH_NORM = pytest.mark.parametrize("norm", NORMS, ids=norm_id)


def check(norm, transformation, rng):
    args = tuple(a.astype(jnp.float32) for a in arguments(norm, rng))
    wide = tuple(a.astype(jnp.float64) for a in args)

    def run(f, args, **options):
        # Epsilon is large enough for groups of one element to have derivatives near one.
        f = functools.partial(f, epsilon=0.01)
        return jax.jit(lambda *args: transformation(f, args), compiler_options=options)(*args)

    ours = run(functools.partial(norm, implementation="kernel"), args)
    truth = run(norm.plain, wide, xla_backend_optimization_level=0)  # compiles faster
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(truth), strict=True):
        assert a.dtype == jnp.float32
        # Rounding of some hundred float32 operations, relative to the largest element.
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1, np.abs(b).max()))


@pytest.mark.parametrize(
    "transformation",
    [reverse_over_reverse, per_example_gradients, gradients_of_some],
    ids=lambda t: t.__name__,
)
@EACH_NORM
def test_agrees_with_the_plain_formula(norm, transformation, rng):
    check(norm, transformation, rng)


# From jax 0.11 on, a barrier can't be transposed if some of its operands are known to be constant.
@pytest.mark.parametrize("argument", [0, 1], ids=["x", "scale"])
@pytest.mark.parametrize("derivative", ["jvp", "vjp"])
@pytest.mark.parametrize("norm", NORMS[:2], ids=norm_id)
def test_the_gradient_of_a_derivative_by_one_argument_alone(norm, derivative, argument, rng):
    def transformation(f, args):
        by_one = lambda a: f(*args[:argument], a, *args[argument + 1 :])

        def loss(a):
            if derivative == "jvp":
                return jnp.sum(jnp.sin(jax.jvp(by_one, (a,), (jnp.cos(a),))[1]))
            y, pullback = jax.vjp(by_one, a)
            return jnp.sum(jnp.sin(pullback(jnp.cos(y))[0]))

        return jax.grad(loss)(args[argument])

    check(norm, transformation, rng)


@pytest.mark.parametrize(
    "transformation",
    [
        forward_over_reverse,
        reverse_over_forward,
        hessian,
        hessian_vector_product,
        vmap_of_grad,
        grad_of_vmap,
        vmap_over_scale,
        nested_vmap,
        scan,
        cond,
        checkpoint,
    ],
    ids=lambda t: t.__name__,
)
@pytest.mark.parametrize("norm", [NORMS[0], NORMS[1]], ids=["columns", "rows"])
@pytest.mark.thorough
def test_other_transformations_agree_too(norm, transformation, rng):
    check(norm, transformation, rng)


def test_a_batch_norm_s_state_has_gradients(rng):
    x = jnp.asarray(rng.standard_normal(SHAPE, np.float32))
    state = jn.init_batch_norm_state(SHAPE[-1])

    def loss(x, implementation):
        y, new = jn.batch_norm(x, state, implementation=implementation)
        return scalar(y) + jnp.sum(new.mean * new.var**2)

    for derivative in (jax.grad, lambda f: jax.grad(lambda x: jnp.sum(jax.grad(f)(x) ** 2))):
        ours, formula = (
            jax.jit(derivative(functools.partial(loss, implementation=implementation)))(x)
            for implementation in ("kernel", "xla")
        )
        # Rounding of some hundred float32 operations, in each of the two.
        np.testing.assert_allclose(ours, formula, rtol=0, atol=2e-5 * np.abs(formula).max())
