"""Scratch memory that compiled programs with the kernel plan."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from norms import NORMS, norm_id

SHAPE = (16, 256, 256)  # 4 MiB of float32, in as many positions as a small image has


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda t: t.__name__)
@pytest.mark.parametrize("norm", NORMS, ids=norm_id)
def test_forward_and_backward_take_a_twentieth_of_the_input(norm, dtype):
    norm = norm.with_groups(SHAPE)
    x = jax.ShapeDtypeStruct(SHAPE, dtype)
    params = [jax.ShapeDtypeStruct(norm.features(SHAPE), jnp.float32)] * 2

    @jax.jit
    def both(dy, *args):
        y, pullback = jax.vjp(norm, *args)
        return y, pullback(dy)

    memory: Any = both.lower(x, x, *params).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 0.05 * x.size * x.dtype.itemsize
