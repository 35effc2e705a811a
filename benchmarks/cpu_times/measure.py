"""Measure one case: prepare every peer, check it against the exact results, and time it."""

import random
from collections.abc import Sequence
from typing import Any

from benchmarks.cpu_times.summary import COPY
from benchmarks.programs.cases import Case
from benchmarks.programs.jax_calls import copy_call
from benchmarks.programs.jax_norms import UnableError
from benchmarks.programs.peers import Peer
from benchmarks.programs.timing import quartiles, take_turns
from benchmarks.programs.truth import largest_error


def measure(
    case: Case, peers: Sequence[Peer], seconds: float, rounds: int, rng: random.Random
) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Return the case's entry in results.json, and one for each peer that could not run it."""
    calls, errors, not_run = {}, {}, []
    for peer in peers:
        try:
            call = peer.make(case)
            errors[peer.name] = largest_error(case, call.results(call.run()))
            calls[peer.name] = call
        except Exception as error:  # other libraries may raise anything
            row = {"case": case.name, "peer": peer.name, "reason": _sentence(error)}
            not_run.append(row)
    copy = copy_call(case)
    if copy is not None:
        calls[COPY] = copy
    measured = take_turns(calls, seconds, rng, rounds)
    result = {
        "case": case.name,
        "norm": case.problem.norm,
        "network": case.problem.network,
        "shape": case.problem.shape,
        "dtype": case.problem.dtype,
        "mode": case.mode,
        "minimum_bytes": case.minimum_bytes,
        "peers": {
            name: quartiles(measured[name])
            | {
                "error": errors.get(name),
                "compile_seconds": call.compile_seconds,
                "scratch_bytes": call.scratch_bytes,
                "note": call.note,
            }
            for name, call in calls.items()
        },
    }
    return result, not_run


def _sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ["no message"]
    return (
        lines[0] if isinstance(error, UnableError) else f"{type(error).__name__}: {lines[0][:200]}"
    )
