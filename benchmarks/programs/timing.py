"""Interleaved timing: all calls of a case are timed together, each round in another order.

A turn begins with calls that are not timed, until the threads of the previous library are asleep:
PyTorch's threads stay awake for about ten milliseconds, on the cores that the next library needs.
There are no pauses, as in a training loop, because a core that wakes up is slow.
"""

import dataclasses
import math
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np

BATCH_SECONDS = 4e-3  # shorter calls are timed in batches
WAKE_SECONDS = 0.02
WARM_UP_SECONDS = 0.02
MOST_ROUNDS = 2000


@dataclasses.dataclass
class Call:
    """One peer's call for one case, ready to be timed.

    Attributes:
      run: starts the call, and returns the argument of `wait` and `results`.
      wait: returns when the results are ready.
      results: turns what `run` returns into arrays with the names and the layout of `truth`.
      queued: whether calls are queued and waited for once, as on a GPU.
      compile_seconds: the compile time, if it was compiled.
      scratch_bytes: what it allocates in addition to arguments and results, if known.
      note: how it differs from the other calls.
    """

    run: Callable[[], Any]
    wait: Callable[[Any], Any]
    results: Callable[[Any], dict[str, np.ndarray]]
    queued: bool = False
    compile_seconds: float | None = None
    scratch_bytes: int | None = None
    note: str = ""

    def seconds(self, times: int) -> float:
        """Return the seconds of one call, averaged over `times` calls."""
        start = time.perf_counter()
        if self.queued:
            for _ in range(times - 1):
                self.run()
            self.wait(self.run())
        else:
            for _ in range(times):
                self.wait(self.run())
        return (time.perf_counter() - start) / times

    def calibrated(self) -> int:
        """Return how many calls to time in one batch; warm the call up."""
        times, spent = 1, self.seconds(1) + self.seconds(1)
        while True:
            one = self.seconds(times)
            spent += times * one
            enough = math.ceil(BATCH_SECONDS / max(one, 1e-9))
            if spent > WARM_UP_SECONDS:
                return max(1, enough)
            times = min(max(1, enough), 4 * times)


def take_turns(
    calls: dict[str, Call], seconds: float, rng: random.Random, rounds: int
) -> dict[str, list[float]]:
    """Time one call of each per round, for at least `rounds` rounds and `seconds`."""
    times = {name: call.calibrated() for name, call in calls.items()}
    measured = {name: [] for name in calls}
    order, end = list(calls), time.perf_counter() + seconds
    for turn in range(MOST_ROUNDS):
        if turn >= rounds and time.perf_counter() > end:
            break
        rng.shuffle(order)
        for name in order:
            awake = time.perf_counter() + WAKE_SECONDS
            while time.perf_counter() < awake:
                calls[name].seconds(times[name])
            measured[name].append(calls[name].seconds(times[name]))
    return measured


def quartiles(seconds: list[float]) -> dict[str, float]:
    """Return the median and the lower and upper quartile."""
    lower, median, upper = np.quantile(seconds, (0.25, 0.5, 0.75))
    return {"median": median, "lower": lower, "upper": upper}
