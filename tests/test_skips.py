"""An unexpected skip fails a run, in one process or several."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import pytest

@pytest.mark.parametrize("number", range(2))
def test_skips(number):
    pytest.skip("no torch")

def test_passes():
    pass
"""


@pytest.mark.parametrize(
    ("expected", "said", "processes"),
    [
        ("# a comment\n2 no torch\n", None, []),
        pytest.param("# a comment\n2 no torch\n", None, ["-n", "2"], marks=pytest.mark.thorough),
        ("", "2 tests skipped where skips.txt expects 0: no torch", []),
        pytest.param(
            "",
            "2 tests skipped where skips.txt expects 0: no torch",
            ["-n", "2"],
            marks=pytest.mark.thorough,
        ),
        ("1 no torch\n", "2 tests skipped where skips.txt expects 1: no torch", []),
        ("2 no torch\n1 no onnx\n", "0 tests skipped where skips.txt expects 1: no onnx", []),
        ("any no torch\nany no onnx\n", None, []),
        (None, None, []),
    ],
    ids=["expected", "expected-n2", "another", "another-n2", "more", "fewer", "any", "unchecked"],
)
def test_only_expected_skips_pass(tmp_path, expected, said, processes):
    (tmp_path / "test_some.py").write_text(TESTS)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "JAXNORM_"))}
    env["PYTHONPATH"] = str(Path(__file__).parent)
    if expected is not None:
        (tmp_path / "skips.txt").write_text(expected)
        env["JAXNORM_SKIPS"] = "skips.txt"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "skips", *processes, "test_some.py"]
    run = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert "1 passed, 2 skipped" in run.stdout
    assert run.returncode == (1 if said else 0)
    assert (said or "") in run.stdout
    assert ("FAILED" in run.stdout) == bool(said)
