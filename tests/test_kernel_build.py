"""Building the CPU kernel, and installing without it."""

import ctypes
import platform
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from contract import program

import jaxnorm as jn
from jaxnorm.kernels import VARIABLE, cpu
from jaxnorm.kernels.cpu import build


@pytest.fixture
def fresh(monkeypatch):
    """Whether there is a kernel is found out anew, before and after the test."""
    monkeypatch.delenv(VARIABLE, raising=False)

    def forget():
        cpu.unavailable_reason.cache_clear()
        cpu._library.cache_clear()

    forget()
    yield
    monkeypatch.undo()
    forget()


def assert_formulas_run(why, rng):
    assert jn.implementations()["cpu"].startswith(f"xla: {why}")
    x = rng.standard_normal((4, 12), np.float32)
    np.testing.assert_array_equal(jn.layer_norm(x), jn.layer_norm(x, implementation="xla"))
    assert "jaxnorm_" not in program(lambda x: jn.rms_norm(x), x)
    with pytest.raises(ValueError, match=why):
        jn.layer_norm(x, implementation="kernel")


@pytest.mark.usefixtures("fresh")
def test_without_a_library_the_formulas_run(monkeypatch, tmp_path, rng):
    monkeypatch.setattr(cpu, "LIBRARY", tmp_path / "none.so")
    monkeypatch.setattr(cpu, "WHY_NOT_BUILT", tmp_path / "none.txt")
    assert_formulas_run("it has not been built", rng)


@pytest.mark.usefixtures("fresh")
def test_the_reason_that_the_install_left_is_told(monkeypatch, tmp_path, rng):
    reason = tmp_path / "why.txt"
    reason.write_text("no C++ compiler was found")
    monkeypatch.setattr(cpu, "LIBRARY", tmp_path / "none.so")
    monkeypatch.setattr(cpu, "WHY_NOT_BUILT", reason)
    assert_formulas_run("it is not in the wheel of jaxnorm, because no C", rng)


def test_a_wheel_without_the_kernel_says_how_to_build_it(monkeypatch, tmp_path):
    """pip keeps such a wheel, and may install it where there is a compiler."""
    pytest.importorskip("hatchling", reason="hatchling is not installed")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("JAXNORM_BUILD_KERNEL", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))  # there is no compiler
    run = lambda *command, cwd: subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=True, cwd=cwd
    ).stdout.splitlines()
    root = Path(__file__).parent.parent
    run("-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path), cwd=root)
    (built,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(tmp_path)
    code = "import jaxnorm; print(jaxnorm.__file__); print(jaxnorm.implementations()['cpu'])"
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    file, cpu_is = run("-c", code, cwd=tmp_path)
    assert Path(file).is_relative_to(tmp_path)
    assert cpu_is == (
        "xla: it is not in the wheel of jaxnorm, because no C++ compiler was found: "
        "run python -m jaxnorm.kernels.cpu.build"
    )


@pytest.mark.thorough
@pytest.mark.skipif(not build.find_compiler(), reason="there is no C++ compiler")
@pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="targets are those of x86-64"
)
@pytest.mark.parametrize(
    ("lacks", "targets"),
    [
        ("x86-64-v4", ["baseline", "avx2"]),
        ("x86-64-v[34]", ["baseline"]),
    ],
)
def test_an_old_compiler_loses_only_the_targets_it_lacks(monkeypatch, tmp_path, lacks, targets):
    compiler = tmp_path / "old-c++"
    real = shlex.join(build.find_compiler() or [])
    compiler.write_text(
        "#!/bin/sh\n"
        f"case \" $* \" in *' '-march={lacks}' '*)\n"
        "  echo \"cc1plus: error: bad value for '-march=' switch\" >&2; exit 1;;\n"
        f'esac\nexec {real} "$@"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    library = tmp_path / "norms.so"
    assert build.build(library, ["-O0"]) == targets
    # Another library than that of this process, which the handlers are registered with.
    use_target = ctypes.CDLL(str(library)).jaxnorm_use_target
    use_target.restype = ctypes.c_bool
    assert not use_target(b"avx512")
    assert use_target(b"baseline")


@pytest.mark.usefixtures("fresh")
def test_a_damaged_library_is_left_alone(monkeypatch, tmp_path, rng):
    damaged = tmp_path / "damaged.so"
    damaged.write_bytes(b"no library")
    monkeypatch.setattr(cpu, "LIBRARY", damaged)
    assert_formulas_run("its library can't be loaded", rng)


@pytest.mark.usefixtures("kernel", "fresh")
def test_a_library_for_a_newer_xla_is_left_alone(monkeypatch, rng):
    monkeypatch.setattr(cpu, "_api_version", lambda: 0)
    assert_formulas_run("it was built for a newer jaxlib", rng)


@pytest.mark.usefixtures("fresh")
def test_the_variable_asks_for_what_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu, "LIBRARY", tmp_path / "none.so")
    monkeypatch.setenv(VARIABLE, "kernel")
    assert jn.implementations()["cpu"].startswith(f"none: {VARIABLE} requires the kernel, but")


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("/nonexistent/c++", "could not be run: No such file"),
        ("false", "false failed to compile it"),
    ],
)
def test_a_build_that_fails_leaves_what_was_there(monkeypatch, tmp_path, compiler, reason):
    monkeypatch.setenv("CXX", compiler)
    library = tmp_path / "norms.so"
    library.write_bytes(b"old")
    with pytest.raises(RuntimeError, match=reason):
        build.build(library)
    assert library.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [library]


def test_without_a_compiler_the_build_says_so(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler was found"):
        build.build(tmp_path / "norms.so")


def test_the_command_ends_with_a_sentence(monkeypatch):
    monkeypatch.setenv("CXX", "false")
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "jaxnorm.kernels.cpu.build"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr.startswith("The kernel is not built: false failed")
