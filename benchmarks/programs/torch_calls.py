"""Calls of PyTorch, eager and compiled.

Images have the features last in memory, as for all libraries. PyTorch calls this channels_last: its
functions get a view with the features first, so no transpose is needed.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.programs.cases import EPSILON, MOMENTUM, Case, Problem
from benchmarks.programs.jax_norms import UnableError
from benchmarks.programs.timing import Call
from benchmarks.programs.truth import context_inputs, inputs

Tensor = Any  # torch.Tensor, if PyTorch is installed
Function = Callable[[Tensor, dict[str, Tensor]], Tensor]


def torch_call(case: Case, *, compiled: bool = False) -> Call:
    """Return the call of PyTorch, on the device that JAX uses."""
    import torch  # pyright: ignore[reportMissingImports] (optional)

    device = _device()
    tensors = lambda arrays: {name: _tensor(a, device) for name, a in arrays.items()}
    params = tensors(inputs(case.problem))
    x, dy = first(params.pop("x")), first(params.pop("dy"))
    function = _norm(case.problem, device)
    note = ""
    if not _takes_float32(case.problem.norm, function, x, params):
        params = {name: a.to(x.dtype) for name, a in params.items()}
        note = f"scale and bias in {case.problem.dtype}"
    if case.mode == "context":
        function = _context(function)
        params |= tensors(context_inputs(case.problem))
        x, dy = last(x), params.pop("dz")
    learned = {"x": x} | params
    for a in learned.values():
        a.requires_grad_(case.mode != "forward")
    if compiled:
        import torch._functorch.config  # pyright: ignore[reportMissingImports] (optional)

        # The residuals of the forward pass are used many times.
        torch._functorch.config.donated_buffer = False
        torch._dynamo.reset()  # its limit of shapes per function is for one program
        function = torch.compile(function, dynamic=False)

    def gradients(y: Tensor, **options: Any) -> dict[str, Tensor]:
        results = torch.autograd.grad(y, list(learned.values()), dy, **options)
        return {f"d{name}": a for name, a in zip(learned, results, strict=True)}

    def both() -> dict[str, Tensor]:
        y = function(x, params)
        return {"z" if case.mode == "context" else "y": y} | gradients(y)

    start = time.perf_counter()
    kept = function(x, params) if case.mode == "backward" else None
    run = {
        "forward": lambda: {"y": function(x, params)},
        "backward": lambda: gradients(kept, retain_graph=True),
        "both": both,
        "context": both,
    }[case.mode]
    call = Call(
        run,
        wait=(lambda _: torch.cuda.synchronize()) if device == "cuda" else (lambda _: None),
        results=lambda out: {
            name: _array(a if case.mode == "context" else last(a)) for name, a in out.items()
        },
        queued=device == "cuda",
        note=note,
    )
    if compiled:
        call.wait(call.run())
        call.compile_seconds = time.perf_counter() - start
    return call


def first(a: Tensor) -> Tensor:
    """Move the features of an image first, as in PyTorch; leave rows unchanged."""
    return a.movedim(-1, 1) if a.ndim == 4 else a


def last(a: Tensor) -> Tensor:
    """Move the features of an image last; leave rows unchanged."""
    return a.movedim(1, -1) if a.ndim == 4 else a


def _norm(problem: Problem, device: str) -> Function:
    import torch  # pyright: ignore[reportMissingImports] (optional)

    f, rows, groups = torch.nn.functional, (problem.features,), problem.groups
    mean, var = (a(rows, device=device) for a in (torch.zeros, torch.ones))
    gain = 1 - MOMENTUM

    def batch(x, p):
        return f.batch_norm(x, mean, var, p["scale"], p["bias"], True, gain, EPSILON)

    return {
        "batch": batch,
        "layer": lambda x, p: f.layer_norm(x, rows, p["scale"], p["bias"], EPSILON),
        "rms": lambda x, p: f.rms_norm(x, rows, p["scale"], EPSILON),
        "group": lambda x, p: f.group_norm(x, groups, p["scale"], p["bias"], EPSILON),
        "instance": lambda x, p: f.instance_norm(x, weight=p["scale"], bias=p["bias"], eps=EPSILON),
    }[problem.norm]


def _context(norm: Function) -> Function:
    def context(x, p):
        h = p["a"] @ p["w_in"] + p["b_in"] + x
        return last(norm(first(h), p)) @ p["w_out"]

    return context


def _device() -> str:
    import torch  # pyright: ignore[reportMissingImports] (optional)

    backend = jax.default_backend()
    if backend == "cpu":
        return "cpu"
    if backend == "gpu" and torch.cuda.is_available():
        return "cuda"
    raise UnableError(
        f"PyTorch must support the device that JAX uses, {backend}, but does not; install its "
        "build for CUDA, or set JAX_PLATFORMS=cpu."
    )


def _takes_float32(norm: str, function: Function, x: Tensor, params: dict[str, Tensor]) -> bool:
    """Return whether y has the dtype of x if scale and bias are float32."""
    if norm == "rms" and x.dtype != params["scale"].dtype:
        return False  # it warns that it does not use its fused kernel
    try:
        return function(x, params).dtype == x.dtype
    except RuntimeError:
        return False


def _tensor(a: np.ndarray, device: str) -> Tensor:
    import torch  # pyright: ignore[reportMissingImports] (optional)

    # Via float32, because PyTorch does not support NumPy's bfloat16.
    wide = torch.from_numpy(np.array(a, np.float32))
    return wide.to(device, getattr(torch, str(a.dtype)))


def _array(a: Tensor) -> np.ndarray:
    return a.detach().float().cpu().numpy()
