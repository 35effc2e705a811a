"""Calls of the peers that run on JAX: only the norm differs."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.programs.cases import Case, Problem
from benchmarks.programs.timing import Call
from benchmarks.programs.truth import context_inputs, inputs

Params = dict[str, jax.Array]


class JaxNorm(NamedTuple):
    """One library's norm as a pure function.

    Attributes:
      apply: maps x, {"scale": ..., "bias": ...} and the state to y and the new state.
      state: the state of batch norm, in the form that the library uses.
      note: how it differs from the other libraries.
    """

    apply: Callable[[jax.Array, Params, Any], tuple[jax.Array, Any]]
    state: Any = ()
    note: str = ""


def jax_call(make: Callable[[Problem], JaxNorm], case: Case) -> Call:
    """Compile the case to a program that returns a dictionary of results and the new state."""
    norm = make(case.problem)
    arrays = {name: jnp.asarray(a) for name, a in inputs(case.problem).items()}
    x, dy = arrays.pop("x"), arrays.pop("dy")
    if case.mode == "forward":
        return compiled(_forward(norm), x, arrays, norm.state, note=norm.note)
    if case.mode == "backward":
        # Flattened here, outside of the timed call.
        kept, structure = jax.tree.flatten(_pullback(norm, x, arrays))
        function = lambda kept, dy: (_named(*jax.tree.unflatten(structure, kept)(dy)), ())
        return compiled(function, kept, dy, note=norm.note)
    if case.mode == "both":
        return compiled(_both(norm), x, arrays, norm.state, dy, note=norm.note)
    others = {name: jnp.asarray(a) for name, a in context_inputs(case.problem).items()}
    dz = others.pop("dz")
    return compiled(_context(norm), others, x, arrays, norm.state, dz, note=norm.note)


def copy_call(case: Case) -> Call | None:
    """Return a plain copy that reads and writes, in total, the minimum bytes of the case."""
    if case.minimum_bytes is None:
        return None
    source = jnp.ones(case.minimum_bytes // 8, jnp.float32)
    return compiled(lambda source: ({"copy": jnp.copy(source)}, ()), source)


def compiled(function: Callable[..., Any], *arguments: Any, note: str = "") -> Call:
    """Compile a function that returns (results by name, state); return its call."""
    start = time.perf_counter()
    program = jax.jit(function).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    memory = program.memory_analysis()
    return Call(
        run=lambda: program(*arguments),
        wait=jax.block_until_ready,
        results=lambda out: {name: np.asarray(a) for name, a in out[0].items()},
        queued=jax.default_backend() != "cpu",
        compile_seconds=seconds,
        scratch_bytes=None if memory is None else memory.temp_size_in_bytes,
        note=note,
    )


def _forward(norm: JaxNorm) -> Callable[..., Any]:
    def forward(x, params, state):
        y, state = norm.apply(x, params, state)
        return {"y": y}, state

    return forward


def _pullback(norm: JaxNorm, x: jax.Array, params: Params) -> Any:
    """Return the backward pass as a function that holds the residuals of the forward pass."""

    @jax.jit
    def forward(x, params):
        return jax.vjp(lambda x, params: norm.apply(x, params, norm.state), x, params, has_aux=True)

    return forward(x, params)[1]


def _both(norm: JaxNorm) -> Callable[..., Any]:
    def both(x, params, state, dy):
        y, pullback, state = jax.vjp(
            lambda x, params: norm.apply(x, params, state), x, params, has_aux=True
        )
        return {"y": y} | _named(*pullback(dy)), state

    return both


def _context(norm: JaxNorm) -> Callable[..., Any]:
    def context(others, x, params, state, dz):
        # "highest", so all peers multiply float32 in float32.
        dot = lambda a, b: jnp.matmul(a, b, precision="highest")

        def forward(others, x, params):
            h = dot(others["a"], others["w_in"]) + others["b_in"][(None,) * (x.ndim - 1)] + x
            y, new_state = norm.apply(h, params, state)
            return dot(y, others["w_out"]), new_state

        z, pullback, state = jax.vjp(forward, others, x, params, has_aux=True)
        d_others, dx, d_params = pullback(dz)
        return {"z": z} | _named(dx, d_others | d_params), state

    return context


def _named(dx: jax.Array, others: Params) -> dict[str, jax.Array]:
    return {"dx": dx} | {f"d{name}": a for name, a in others.items()}
