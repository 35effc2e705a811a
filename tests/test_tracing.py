"""Tracing starts none of JAX's backends, so `jax.distributed.initialize` may follow it."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "programs",
    ["functions", *(pytest.param(name, marks=pytest.mark.thorough) for name in ("linen", "nnx"))],
)
def test_tracing_starts_no_backend(programs):
    command = [sys.executable, str(Path(__file__).with_name("traced.py")), programs]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
