"""Spectral normalization: weights divided by their largest singular value."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import export, lax
from jax.typing import ArrayLike

from jaxnorm.core.arguments import check_epsilon, check_feature_array, check_input, check_train
from jaxnorm.core.arithmetic import promote, real_product
from jaxnorm.core.axes import Axes, check_integer
from jaxnorm.core.exporting import jit
from jaxnorm.core.layout import Layout
from jaxnorm.core.layouts import batch_layout, make_layout, moments_layout
from jaxnorm.core.lengths import scaled_to_one, unit

UNROLLED = 4  # power iterations; more are a loop


@functools.partial(
    export.register_namedtuple_serialization, serialized_name="jaxnorm.SpectralNormState"
)
class SpectralNormState(NamedTuple):
    """Estimates of the singular vectors of weights for their largest singular value.

    Attributes:
      u: the vector of the features, of their shape.
      v: the vector of the other axes, of their shape.
    """

    u: jax.Array
    v: jax.Array


def init_spectral_norm_state(
    w: ArrayLike, key: jax.Array, *, feature_axis: Axes = -1
) -> SpectralNormState:
    """Make the initial state: a random direction u, and v = W u / |W u|.

    Args:
      w: weights such as a kernel of shape (inputs, features); floating-point or complex.
      key: of the random numbers, as made by `jax.random.key`.
      feature_axis: the axis of the features, or several.

    Returns:
      A state in float32 or better, of unit vectors; v is zero if w is.

    Raises:
      TypeError: w is of an integer type.
      ValueError: an axis is out of range or given twice, or w is a scalar.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxnorm as jn
      >>> state = jn.init_spectral_norm_state(jnp.ones((3, 3, 8, 16)), jax.random.key(0))
      >>> state.u.shape, state.v.shape
      ((16,), (3, 3, 8))
    """
    w = check_input(w, "w")
    layout = batch_layout(w.shape, feature_axis)
    u = jax.random.normal(key, layout.feature_shape, promote(w.dtype, jnp.float32))
    return init_vectors(layout, w, u)


def spectral_norm(
    w: ArrayLike,
    state: SpectralNormState,
    *,
    steps: int = 1,
    train: bool = True,
    epsilon: float = 1e-12,
    feature_axis: Axes = -1,
) -> tuple[jax.Array, SpectralNormState]:
    """Apply spectral normalization: divide w by an estimate of its largest singular value.

        v = W u / |W u|,    u = W^T v / |W^T v|    (steps times, in training)
        y = w / sigma,    sigma = v^T W u

    W is w as a matrix: its columns are the features, its rows all other axes. u and v are constants
    for the derivative; sigma is not. It is right for weights of any magnitude.

    Args:
      w: weights such as a kernel of shape (height, width, inputs, features); floating-point or
        complex.
      state: u and v; a vector that W takes to zero leaves the other one as it is.
      steps: the number of power iterations in training; a Python integer. One is enough if the
        weights change little between calls.
      train: whether to iterate; a Python bool. Otherwise u and v are those of the state.
      epsilon: w is divided by sigma only if that is larger, else by 1; in units of w.
      feature_axis: the axis of the features, or several.

    Returns:
      y, of the shape and dtype of w, and the new state (the same one if not `train`). The
      arithmetic is in float32 or better.

    Raises:
      TypeError: w is of an integer type, state is not a SpectralNormState of float32 or better,
        steps is not an integer, or `train` is traced.
      ValueError: an axis is out of range or given twice, the state does not fit, w is a scalar,
        steps is less than one, or epsilon is negative.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxnorm as jn
      >>> w = jnp.array([[3.0, 0.0], [0.0, 1.0]])
      >>> state = jn.init_spectral_norm_state(w, jax.random.key(0))
      >>> y, state = jn.spectral_norm(w, state, steps=10)
      >>> y.round(4)
      Array([[1.    , 0.    ],
             [0.    , 0.3333]], dtype=float32)
      >>> y, _ = jn.spectral_norm(w, state, train=False)

    References:
      Miyato, Kataoka, Koyama and Yoshida, "Spectral Normalization for Generative Adversarial
      Networks", 2018, arXiv:1802.05957.
    """
    w = check_input(w, "w")
    layout = batch_layout(w.shape, feature_axis)
    state = _check_state(state, layout, w.dtype)
    epsilon, steps = check_epsilon(epsilon), _check_steps(steps)
    y, new_state, _ = spectral_normalize(
        layout, steps if check_train(train) else 0, epsilon, w, state
    )
    return y, new_state if train else state


@functools.partial(jit, static_argnums=0)
def init_vectors(layout: Layout, w: jax.Array, u: jax.Array) -> SpectralNormState:
    """Make the state from a vector u of any length."""
    w, u = (a.astype(promote(a.dtype, w.dtype, jnp.float32)) for a in (w, u))
    matrix, _ = scaled_to_one(w, _whole(layout))
    u = unit(u, tuple(range(u.ndim)))
    v = _product(_transposed(layout), matrix, layout.broadcast(u))
    return SpectralNormState(u, unit(v, tuple(range(v.ndim))))


@functools.partial(jit, static_argnums=(0, 1, 2))
def spectral_normalize(
    layout: Layout, steps: int, epsilon: float, w: jax.Array, state: SpectralNormState
) -> tuple[jax.Array, SpectralNormState, jax.Array]:
    """Return w / sigma, the state after `steps` power iterations, and sigma."""
    with jax.named_scope("spectral_norm"):
        transposed, whole = _transposed(layout), _whole(layout)
        # With weights near one, neither products nor the square in the derivative overflow.
        matrix, scale = scaled_to_one(w, whole)
        constant = lax.stop_gradient(matrix)

        def step(_, state):
            u, v = state
            v = _turned(v, _product(transposed, constant, layout.broadcast(u)))
            u = _turned(u, _product(layout, jnp.conj(constant), transposed.broadcast(v)))
            return SpectralNormState(u, v)

        given = jax.tree.map(lambda a: lax.stop_gradient(a.astype(matrix.dtype)), state)
        vectors = SpectralNormState(*(_on_mesh_of(matrix, vector) for vector in given))
        u, v = lax.fori_loop(0, steps, step, vectors, unroll=max(1, min(steps, UNROLLED)))
        new_state = SpectralNormState(u.astype(state.u.dtype), v.astype(state.v.dtype))
        of_u = matrix * layout.broadcast(u)
        sigma = whole.sum(real_product(of_u, jnp.broadcast_to(transposed.broadcast(v), w.shape)))
        # The divisor is one in units of w, so that weights of zero have a gradient of usual size.
        divisor = jnp.where(jnp.abs(sigma) > epsilon / scale, sigma, 1 / scale)
        y = matrix / divisor.astype(matrix.dtype)
        return y.astype(w.dtype), new_state, jnp.squeeze(sigma * scale)


def _product(layout: Layout, matrix: jax.Array, vector: jax.Array) -> jax.Array:
    """Multiply the matrix by a vector that broadcasts against it."""
    return jnp.squeeze(layout.sum(matrix * vector), layout.reduction_axes)


def _on_mesh_of(matrix: jax.Array, vector: jax.Array) -> jax.Array:
    """Move a vector to the explicit mesh of the matrix, if it is on none."""
    sharding = jax.typeof(matrix).sharding
    if sharding.mesh.empty or not jax.typeof(vector).sharding.mesh.empty:
        return vector
    return jax.sharding.reshard(vector, sharding.update(spec=jax.P(*[None] * vector.ndim)))


def _turned(old: jax.Array, new: jax.Array) -> jax.Array:
    """Return the direction of the new vector, or the old vector if the new one is zero."""
    if jax.typeof(new).sharding != jax.typeof(old).sharding:
        new = jax.sharding.reshard(new, jax.typeof(old).sharding)
    return jnp.where(jnp.any(new != 0), unit(new, tuple(range(new.ndim))), old)


def _transposed(layout: Layout) -> Layout:
    return make_layout(
        layout.shape, reduction_axes=layout.feature_axes, feature_axes=layout.reduction_axes
    )


def _whole(layout: Layout) -> Layout:
    return moments_layout(layout.shape, tuple(range(len(layout.shape))))


def _check_state(state: Any, layout: Layout, dtype: jnp.dtype) -> SpectralNormState:
    if not isinstance(state, SpectralNormState):
        raise TypeError(
            f"state must be a SpectralNormState, got {type(state).__name__}; start with "
            "jaxnorm.init_spectral_norm_state(w, key)."
        )
    u = check_feature_array(state.u, "state.u", layout, dtype)
    v = check_feature_array(state.v, "state.v", _transposed(layout), dtype)
    kind = jnp.complex64 if jnp.issubdtype(dtype, jnp.complexfloating) else jnp.float32
    for name, vector in (("u", u), ("v", v)):
        if promote(vector.dtype, kind) != vector.dtype:
            raise TypeError(
                f"state.{name} must be {jnp.dtype(kind)} or better where w is {dtype}, got "
                f"{vector.dtype}; make it with jaxnorm.init_spectral_norm_state(w, key)."
            )
    return SpectralNormState(u, v)


def _check_steps(steps: Any) -> int:
    number = check_integer(steps, "steps")
    if number < 1:
        raise ValueError(
            f"steps must be at least 1, got {number}; to use the state as it is, pass train=False."
        )
    return number
