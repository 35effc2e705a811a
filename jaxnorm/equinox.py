"""Equinox modules: drop-ins for the classes of the same names in `equinox.nn`.

Each inherits from Equinox's class and replaces `__call__`. Arguments, fields and state are
Equinox's, so files of `equinox.tree_serialise_leaves` load in both directions and `isinstance`
holds. The modules own arrays and do no arithmetic.

`import jaxnorm` does not import it: `import jaxnorm.equinox`. It needs Equinox: `pip install
equinox`.

Statistics are always accurate, and in float32 or better. The result has the dtype of x. Equinox's
BatchNorm returns the common dtype of x, parameters and state: float32 for x in half precision,
unless the module is in half precision too. The state keeps its dtype for any x. x of an
integer type is an error.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnorm._signatures import inherit_signature
from jaxnorm.core.arguments import check_flag, check_input
from jaxnorm.core.arithmetic import promote
from jaxnorm.core.standardize import NormParams
from jaxnorm.functional.batch import batch_norm
from jaxnorm.functional.group import group_norm
from jaxnorm.functional.layer import layer_norm
from jaxnorm.functional.rms import rms_norm
from jaxnorm.functional.running import normalize_by_running
from jaxnorm.functional.state import BatchNormState, debiased

try:
    from equinox import nn  # pyright: ignore[reportMissingImports] (optional)
except ModuleNotFoundError as error:
    if error.name != "equinox":
        raise
    raise ModuleNotFoundError(
        "jaxnorm.equinox must have Equinox, got no package of that name; run pip install equinox.",
        name="equinox",
    ) from None

__all__ = ["BatchNorm", "GroupNorm", "LayerNorm", "RMSNorm"]

_NO_STATE: Any = inspect.signature(nn.LayerNorm.__call__).parameters["state"].default


class LayerNorm(nn.LayerNorm):
    """`jaxnorm.layer_norm` of one example, over all its axes, with learned scale and bias.

    `eps` is epsilon, `weight` the scale. For more examples, map: `jax.vmap(norm)(x)`.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxnorm.equinox as jn
      >>> norm = jn.LayerNorm(5)
      >>> norm(jnp.array([2.0, 4.0, 6.0, 8.0, 10.0])).round(4)
      Array([-1.4142, -0.7071,  0.    ,  0.7071,  1.4142], dtype=float32)
      >>> jax.vmap(norm)(jnp.ones((8, 5))).shape
      (8, 5)
    """

    __init__ = nn.LayerNorm.__init__  # for type checkers

    @inherit_signature(nn.LayerNorm.__call__)
    def __call__(self, x: ArrayLike, state: Any = _NO_STATE, *, key: Any = None) -> Any:
        """Normalize x, floating-point or complex; a state, if there is one, is returned as it is.

        Raises:
          TypeError: x is of an integer type.
          ValueError: x does not have the shape of the module, or epsilon is negative.
        """
        return _beside(state, _over_all_axes(layer_norm, self, x))


class RMSNorm(nn.RMSNorm):
    """`jaxnorm.rms_norm` of one example, over all its axes, with learned scale and bias.

    Arguments as in LayerNorm.

    Examples:
      >>> import jax.numpy as jnp, jaxnorm.equinox as jn
      >>> jn.RMSNorm(4)(jnp.array([0.0, 0.0, 0.0, 4.0])).round(4)
      Array([0., 0., 0., 2.], dtype=float32)
    """

    __init__ = nn.RMSNorm.__init__

    @inherit_signature(nn.RMSNorm.__call__)
    def __call__(self, x: ArrayLike, state: Any = _NO_STATE, *, key: Any = None) -> Any:
        """Normalize x; errors and state as in LayerNorm."""
        return _beside(state, _over_all_axes(rms_norm, self, x))


class GroupNorm(nn.GroupNorm):
    """`jaxnorm.group_norm` of one example (channels, ...), with learned scale and bias.

    `groups` is num_groups.

    Examples:
      >>> import jax.numpy as jnp, jaxnorm.equinox as jn
      >>> jn.GroupNorm(groups=2, channels=4)(jnp.array([1.0, 3.0, 10.0, 30.0])).round(4)
      Array([-1.,  1., -1.,  1.], dtype=float32)
    """

    __init__ = nn.GroupNorm.__init__

    @inherit_signature(nn.GroupNorm.__call__)
    def __call__(self, x: ArrayLike, state: Any = _NO_STATE, *, key: Any = None) -> Any:
        """Normalize x; errors and state as in LayerNorm. The groups must divide the channels."""
        x = check_input(x)
        if self.channelwise_affine:
            _check_channels(x, self.channels)
        params = NormParams(self.weight, self.bias)
        options: Any = {"num_groups": self.groups, "feature_axis": 1, "epsilon": self.eps}
        return _beside(state, group_norm(x[None], params, **options)[0])


class BatchNorm(nn.BatchNorm):
    """`jaxnorm.batch_norm` of one example (channels, ...), with learned scale and bias.

    In training, `jax.vmap` or another map binds `axis_name`, or each of several names (with a
    `jax.vmap` inside of a `jax.shard_map`, the latter takes check_vma=False). With `mode="batch"`,
    statistics are those of the batch; in inference, the averages of Equinox's state, divided by
    1 - momentum**count. With `mode="ema"` they are running averages in training too, through which
    gradients flow.

    Examples:
      >>> import equinox as eqx, jax, jax.numpy as jnp, jaxnorm.equinox as jn
      >>> norm, state = eqx.nn.make_with_state(jn.BatchNorm)(2, axis_name="batch", mode="batch")
      >>> mapped = jax.vmap(norm, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
      >>> y, state = mapped(jnp.array([[1.0, 10.0], [3.0, 30.0]]), state)
      >>> y.round(4)
      Array([[-1., -1.],
             [ 1.,  1.]], dtype=float32)
      >>> norm = eqx.nn.inference_mode(norm)
      >>> y, state = norm(jnp.array([2.0, 20.0]), state)
    """

    __init__ = nn.BatchNorm.__init__

    @inherit_signature(nn.BatchNorm.__call__)
    def __call__(
        self, x: ArrayLike, state: nn.State, *, key: Any = None, inference: bool | None = None
    ) -> tuple[jax.Array, nn.State]:
        """Normalize x; the second result is the state, updated unless in inference.

        Raises:
          TypeError: x is of an integer type, or complex and the module is not.
          ValueError: x does not have the channels of the module, nothing binds `axis_name` (also a
            NameError), momentum is outside [0, 1], or epsilon is negative.
        """
        x = check_input(x)
        _check_channels(x, self.input_size)
        inference = check_flag(self.inference if inference is None else inference, "inference")
        return (_by_batch if self.mode == "batch" else _by_averages)(self, x, state, inference)


def _by_batch(norm: Any, x: jax.Array, state: nn.State, inference: bool):
    averages, count = state.get(norm.batch_state_index), state.get(norm.batch_counter)
    running = _running(averages, x, count)
    if inference:
        return _infer(norm, x, debiased(running, norm.momentum)), state
    y, moved = batch_norm(x, running, norm.axis_name, momentum=norm.momentum, **_options(norm))
    state = state.set(norm.batch_counter, count + 1)  # weakly typed if it was
    return y, state.set(norm.batch_state_index, _rounded(moved, averages))


def _by_averages(norm: Any, x: jax.Array, state: nn.State, inference: bool):
    averages, first = state.get(norm.ema_state_index), state.get(norm.ema_first_time_index)
    running = _running(averages, x, jnp.where(first, 0, 1))
    if inference:
        return _infer(norm, x, running), state
    y, moved = normalize_by_running(
        x, running, norm.axis_name, momentum=norm.momentum, **_options(norm)
    )
    state = state.set(norm.ema_first_time_index, jnp.zeros_like(first))
    return y, state.set(norm.ema_state_index, _rounded(moved, averages))


def _infer(norm: Any, x: jax.Array, running: BatchNormState) -> jax.Array:
    return batch_norm(x, running, train=False, **_options(norm))[0]


def _options(norm: Any) -> dict[str, Any]:
    params = NormParams(norm.weight, norm.bias)
    return {"params": params, "epsilon": norm.eps, "feature_axis": 0}


def _running(averages: tuple, x: jax.Array, count: jax.Array) -> BatchNormState:
    """Return the averages of a state in float32 or better; in a complex module both are complex."""
    mean, var = averages
    if jnp.iscomplexobj(x) and not jnp.iscomplexobj(mean):
        raise TypeError(
            f"x must be real where the state is, got {x.dtype} and a state of {mean.dtype}; make "
            "the module with a complex dtype."
        )
    mean, var = (a.astype(promote(a.dtype, jnp.float32)) for a in (mean, jnp.real(var)))
    return BatchNormState(mean, var, count)


def _rounded(moved: BatchNormState, averages: tuple) -> tuple[jax.Array, jax.Array]:
    """Cast the new averages to the dtypes of the old ones."""
    return moved.mean.astype(averages[0].dtype), moved.var.astype(averages[1].dtype)


def _over_all_axes(function: Callable, norm: Any, x: ArrayLike) -> jax.Array:
    x = check_input(x)
    if x.shape != norm.shape:
        raise ValueError(
            f"x must have the shape that this module was made for, {norm.shape}, got {x.shape}; "
            "map it over the other axes: jax.vmap(norm)(x)."
        )
    params, axes = NormParams(norm.weight, norm.bias), tuple(range(x.ndim))
    return function(x, params, axis=axes, epsilon=norm.eps)


def _check_channels(x: jax.Array, channels: int | None) -> None:
    if x.shape[:1] != (channels,):
        raise ValueError(
            f"x must have the {channels} channels that this module was made for as its first axis, "
            f"got shape {x.shape}; map it over the axes of the batch, and put the channels first."
        )


def _beside(state: Any, y: jax.Array) -> Any:
    return y if state is _NO_STATE else (y, state)
