"""The transformations of JAX, as functions of a norm f(x, scale, bias) and of its arguments."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax

SHAPE = (8, 3, 4)


def scalar(y):
    """A loss that weighs every element differently, so that no gradient vanishes by symmetry."""
    return jnp.sum(jnp.sin(y) * jnp.linspace(-1, 2, y.size, dtype=y.dtype).reshape(y.shape))


def value(f, args):
    return f(*args)


def jvp(f, args):
    return jax.jvp(f, args, jax.tree.map(jnp.cos, args))


def linearize(f, args):
    return jax.linearize(f, *args)[1](*jax.tree.map(jnp.cos, args))


def vjp(f, args):
    return jax.vjp(f, *args)[1](jnp.cos(args[0]))


def grad(f, args):
    return jax.grad(lambda *args: scalar(f(*args)), (0, 1, 2))(*args)


def jacobians(f, args):
    return jax.jacfwd(f, (0, 1, 2))(*args), jax.jacrev(f, (0, 1, 2))(*args)


def forward_over_reverse(f, args):
    return jvp(lambda *args: grad(f, args), args)


def reverse_over_forward(f, args):
    return jax.grad(lambda *args: scalar(jvp(f, args)[1]), (0, 1, 2))(*args)


def reverse_over_reverse(f, args):
    def squares(*args):
        return sum(jnp.sum(g**2) for g in grad(f, args))

    return jax.grad(squares, (0, 1, 2))(*args)


def hessian(f, args):
    x, scale, bias = args
    return jax.hessian(lambda x: scalar(f(x, scale, bias)))(x)


def third_order(f, args):
    x, scale, bias = args

    def along(t):
        return scalar(f(x + t * jnp.cos(x), scale, bias))

    return jax.grad(jax.grad(jax.grad(along)))(0.0)


def vmap_of_grad(f, args):
    batched = jax.tree.map(lambda a: jnp.stack([a, 2 * a + 1, -a]), args)
    return jax.vmap(lambda *args: grad(f, args))(*batched)


def grad_of_vmap(f, args):
    x, scale, bias = args
    batched = jax.vmap(f, (0, None, None))
    return grad(lambda x, *p: batched(x, *p), (jnp.stack([x, 2 * x, -x], 0), scale, bias))


def scan(f, args):
    x, scale, bias = args

    def body(x, _):
        return (f(x, scale, bias) + x, None)

    return jax.grad(lambda x: scalar(lax.scan(body, x, length=3)[0]))(x)


def cond(f, args):
    def branch(*args):
        return lax.cond(args[0][0, 0, 0] > 9, lambda *a: a[0], f, *args)

    return grad(branch, args)


def while_loop(f, args):
    x, scale, bias = args

    def loop(x):
        def step(carry):
            return (carry[0] + 1, f(carry[1], scale, bias))

        return lax.while_loop(lambda carry: carry[0] < 3, step, (0, x))[1]

    return jax.jvp(loop, (x,), (jnp.cos(x),))


def checkpoint(f, args):
    return grad(jax.checkpoint(f), args), reverse_over_reverse(jax.checkpoint(f), args)


def exported(f, args):
    backward = jax.jit(lambda *args: grad(f, args))
    return export.deserialize(export.export(backward)(*args).serialize()).call(*args)


def exported_vjp(f, args):
    call = export.deserialize(export.export(jax.jit(f))(*args).serialize(vjp_order=1)).call
    return grad(call, args)


def nested_vmap(f, args):
    def per_example(x):
        return jax.grad(lambda *args: scalar(f(*args)), (0, 1, 2))(x, *args[1:])

    x = args[0]
    return jax.vmap(jax.vmap(per_example))(
        jnp.stack([jnp.stack([x, 2 * x]), jnp.stack([-x, x + 1])])
    )


def per_example_gradients(f, args):
    x, scale, bias = args
    xs = jnp.stack([x, 2 * x + 1, -x])
    one = jax.grad(lambda params, x: scalar(f(x, *params)))
    return jax.vmap(one, (None, 0))((scale, bias), xs), jax.vmap(one, (None, -1), 1)(
        (scale, bias), jnp.moveaxis(xs, 0, -1)
    )


def vmap_over_scale(f, args):
    x, scale, bias = args
    scales = jnp.stack([scale, 2 * scale])
    batched = lambda x, scales, bias: jax.vmap(f, (None, 0, None))(x, scales, bias)
    return grad(batched, (x, scales, bias))


def gradients_of_some(f, args):
    x, scale, bias = args
    return (
        jax.grad(lambda x: scalar(f(x, scale, bias)))(x),
        jax.grad(lambda p: scalar(f(x, *p)))((scale, bias)),
        jax.grad(lambda p: scalar(f(x, p, None)))(scale),
        jax.grad(lambda x: scalar(f(x, None, None)))(x),
    )


def hessian_vector_product(f, args):
    gradient = jax.grad(lambda *args: scalar(f(*args)), (0, 1, 2))
    _, pullback = jax.vjp(lambda *args: gradient(*args), *args)
    return jax.jvp(gradient, args, args)[1], pullback(args)


TRANSFORMATIONS = [
    value,
    jvp,
    linearize,
    vjp,
    grad,
    jacobians,
    forward_over_reverse,
    reverse_over_forward,
    reverse_over_reverse,
    hessian,
    third_order,
    vmap_of_grad,
    grad_of_vmap,
    scan,
    cond,
    while_loop,
    checkpoint,
    exported,
    exported_vjp,
]


def arguments(norm, rng):
    x = jnp.asarray(rng.standard_normal(SHAPE) + 1)
    scale, bias = (jnp.asarray(rng.standard_normal(norm.features(SHAPE))) for _ in range(2))
    return x, scale, bias


def assert_same(ours, plain):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        # Rounding of some hundred float64 operations, relative to the largest element.
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * max(1, np.abs(b).max()))
