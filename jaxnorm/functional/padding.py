"""Padding of batches, so that the number of devices divides them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def pad_batch(batch: Any, multiple: int) -> tuple[Any, Any]:
    """Pad the batch with zeros until `multiple` divides it; return which examples are real.

    A batch of any size can then be sharded over devices. Pass the second result to a norm as
    `where`: statistics and gradients are then those of the real examples, on whichever device they
    are. The loss must leave out the padding too.

    Args:
      batch: an array, or a pytree of arrays, of shape (examples, ...).
      multiple: the number of devices, or another number that has to divide the batch.

    Returns:
      The arrays, of shape (padded, ...), and a boolean array of shape (padded,), True for the
      examples that were given. NumPy arrays give NumPy arrays.

    Raises:
      TypeError: multiple is not an integer.
      ValueError: multiple is less than one, or the arrays have no or different first axes.

    Examples:
      >>> import numpy as np, jaxnorm as jn
      >>> x, real = jn.pad_batch(np.ones((6, 2), np.float32), 4)
      >>> x.shape, real
      ((8, 2), array([ True,  True,  True,  True,  True,  True, False, False]))
      >>> y, _ = jn.batch_norm(x, jn.init_batch_norm_state(2), where=real[:, None])
    """
    sizes = {np.shape(a)[:1] for a in jax.tree.leaves(batch)}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(
            "batch must be arrays of shape (examples, ...) with one number of examples, got "
            f"{[np.shape(a) for a in jax.tree.leaves(batch)]}; put a batch axis in front of each."
        )
    if not isinstance(multiple, int | np.integer):
        raise TypeError(
            f"multiple must be an integer, got {multiple!r}; pass the number of devices, such as "
            "jax.device_count()."
        )
    if multiple < 1:
        raise ValueError(f"multiple must be at least 1, got {multiple}; it divides the result.")
    ((examples,),) = sizes
    missing = -examples % int(multiple)

    def pad(a):
        module = jnp if isinstance(a, jax.Array) else np
        return module.pad(a, [(0, missing)] + [(0, 0)] * (np.ndim(a) - 1))

    real = np.arange(examples + missing) < examples
    on_device = any(isinstance(a, jax.Array) for a in jax.tree.leaves(batch))
    return jax.tree.map(pad, batch), jnp.asarray(real) if on_device else real
