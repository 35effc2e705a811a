"""The machine: hardware, versions, memory settings and import times."""

import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DISTRIBUTIONS = (
    "jaxnorm", "jax", "jaxlib", "flax", "dm-haiku", "equinox", "keras", "torch", "numpy",
)  # fmt: skip

# New pages for a large result cost the operating system more time than the norm takes. A program
# that has run for a while has its pages, so pages are kept here too. glibc reads these variables
# when a process starts.
KEEP_PAGES = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "MALLOC_TOP_PAD_": str(2**28),
    "MALLOC_ARENA_MAX": "1",  # one heap for all threads; other heaps return pages
}


def pages_kept(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process keeps the pages that it frees."""
    return platform.libc_ver()[0] == "glibc" and KEEP_PAGES.items() <= environment.items()


def restart_keeping_pages() -> None:
    """Restart this process with `KEEP_PAGES`, unless they are set or the C library is not glibc."""
    if platform.libc_ver()[0] == "glibc" and not pages_kept():
        command = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **KEEP_PAGES})


def describe() -> dict[str, Any]:
    """Describe the machine and the installed versions."""
    import jax

    versions = {"python": platform.python_version()}
    for distribution in DISTRIBUTIONS:
        try:
            versions[distribution] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = jax.devices()[0]
    threads = None
    if "torch" in versions:
        import torch  # pyright: ignore[reportMissingImports] (optional)

        threads = torch.get_num_threads()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": _cores(),
        "backend": jax.default_backend(),
        "device": device.device_kind,
        "torch_threads": threads,
        "pages_kept": pages_kept(),
        "versions": versions,
    }


def import_seconds(module: str, times: int = 3) -> float:
    """Return the median time of several imports, each in a new process."""
    code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    environment = {**os.environ, "KERAS_BACKEND": "jax"}
    run = lambda: subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment
    )
    return statistics.median(float(run().stdout.splitlines()[-1]) for _ in range(times))


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
