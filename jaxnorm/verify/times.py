"""The times of a norm, forward and backward, with the kernel and with XLA."""

import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxnorm.verify.cases import Case

ROUNDS, CALLS = 7, 10
ROUND_SECONDS = 0.05  # a round has fewer calls if they take longer


def programs(case: Case, implementation: str) -> dict[str, Callable]:
    """Return calls of the forward pass, with residuals as in training, and of the backward."""
    args, cotangent = case.arrays()
    function = case.function(implementation)

    @jax.jit
    def forward(*args):
        result, pullback = jax.vjp(function, *args)
        # An array that is returned twice would be copied.
        others = (*args, *jax.tree.leaves(result))
        return result, [a for a in jax.tree.leaves(pullback) if not any(a is b for b in others)]

    pullback = jax.jit(lambda *args: jax.vjp(function, *args)[1])(*args)
    backward = jax.jit(lambda pullback, cotangent: pullback(cotangent))
    return {"forward": lambda: forward(*args), "backward": lambda: backward(pullback, cotangent)}


def medians(calls: dict[str, Callable]) -> dict[str, float]:
    """Return the median seconds of each call; short calls are queued, as in training."""

    def time_calls(call, count):
        start, results = time.perf_counter(), None
        for _ in range(count):
            results = call()
        jax.block_until_ready(results)
        return (time.perf_counter() - start) / count

    counts, seconds = {}, {name: [] for name in calls}
    for name, call in calls.items():
        jax.block_until_ready(call())
        counts[name] = round(min(CALLS, max(1, ROUND_SECONDS / time_calls(call, 1))))
    for _ in range(ROUNDS):
        for name, call in calls.items():
            seconds[name].append(time_calls(call, counts[name]))
    return {name: statistics.median(each) for name, each in seconds.items()}


def times(case: Case) -> dict[str, float]:
    """Return the seconds of the kernel and of XLA, forward and backward, and of a copy."""
    (x, *_), _ = case.arrays()
    copy = jax.jit(jnp.negative)
    calls = {"copy": lambda: copy(x)}
    for implementation in ("kernel", "xla"):
        for name, call in programs(case, implementation).items():
            calls[f"{implementation} {name}"] = call
    return medians(calls)
