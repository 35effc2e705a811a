"""Bytes that the kernels of Pallas move, counted from their grids and blocks.

A kernel runs once for each point of its grid. Before that, the block of each operand is copied to
the chip, unless it is the block that was there; after that, the block of each result is copied
back. So the blocks that a kernel asks for tell what it moves. benchmarks/hlo.py does not see them:
it reads what the kernel itself says (`pl.CostEstimate`), and tests compare the two.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core


def calls_of(f: Callable, *args: Any) -> list[Any]:
    """The calls of kernels in a function, whose arguments may be shapes and dtypes."""
    return list(_calls(jax.make_jaxpr(f)(*args).jaxpr))


def moved(call: Any) -> int:
    """The bytes that a call moves."""
    mapping = call.params["grid_mapping"]
    points = np.array(list(itertools.product(*map(range, mapping.grid))), np.int32)
    return sum(_moved(block, points) for block in mapping.block_mappings)


def said(call: Any) -> int:
    """The bytes that a call says it moves."""
    return call.params["cost_estimate"].bytes_accessed


def vmem(text: str) -> int:
    """The most bytes of VMEM that a kernel of an optimized program takes."""
    used = r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"0","size":"(\d+)"'
    calls = [line for line in text.splitlines() if '"tpu_custom_call"' in line]
    return max((int(size) for line in calls for size in re.findall(used, line)), default=0)


def _moved(mapping: Any, points: np.ndarray) -> int:
    """Those of one operand or result, block after block."""
    array, jaxpr = mapping.array_aval, mapping.index_map_jaxpr
    place = lambda *at: jnp.stack([jnp.int32(i) for i in core.jaxpr_as_fun(jaxpr)(*at)])
    places = np.asarray(jax.vmap(place)(*points.T))
    block = np.array([_size(size) for size in mapping.block_shape])
    changes = np.any(places[1:] != places[:-1], axis=1)
    total = 0
    for at in places[np.concatenate([[True], changes])]:
        total += math.prod(np.minimum(block, array.shape - block * at).tolist())
    return total * array.dtype.itemsize


def _size(block: Any) -> int:
    """How many indices of an axis a block has; None and the like are one."""
    return block if isinstance(block, int) else getattr(block, "block_size", 1)


def _calls(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
        else:
            for inner in core.jaxprs_in_params(equation.params):
                yield from _calls(inner)
