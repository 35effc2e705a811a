"""The CPU kernel under sanitizers of addresses, undefined behaviour, and threads; and for Arm.

Everything in the library runs: handlers, threads, and one target. The targets are one source
compiled for different vectors, so each sanitizer sees one of them: not that for AVX-512, whose
masked loads and stores sanitizers do not see. Compiling takes a minute, so this runs only where
JAXNORM_SANITIZERS=1 asks for it, as .ci/run does.
"""

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jaxlib
import pytest

from jaxnorm.kernels.cpu import build

PROGRAM = Path(__file__).with_name("calls.cc")
LEVEL = [
    "-DJAXNORM_TARGET=sanitized",
    "-DJAXNORM_NAME=kBaseline",
]  # the only one that handlers.cc sees
SOURCES = [build.HERE / "target.cc", build.HERE / "handlers.cc", PROGRAM]


@pytest.fixture(autouse=True)
def asked_for():
    """Skips a test that nobody asked for."""
    if os.environ.get("JAXNORM_SANITIZERS") != "1":
        pytest.skip("JAXNORM_SANITIZERS=1 runs it")


def compiled(compiler, folder, sources, options):
    """A program of these sources."""
    include = str(Path(jaxlib.__file__).parent / "include")
    flags = ["-std=c++17", "-O1", "-g1", "-Wno-psabi", "-pthread", *options]
    includes = ["-I", str(build.HERE), "-isystem", include]

    def compile_one(source):
        result = str(folder / f"{source.stem}.o")
        run([*compiler, *flags, *includes, "-c", str(source), "-o", result])
        return result

    run = lambda command: subprocess.run(command, check=True, capture_output=True, text=True)
    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(compile_one, sources))
    program = str(folder / sources[-1].stem)
    run([*compiler, *flags, *objects, "-o", program])
    return program


def sanitized(sanitizer, folder, sources, options=()):
    """A program that stops where the sanitizer finds something."""
    compiler = build.find_compiler()
    if not compiler:
        pytest.skip("there is no C++ compiler")
    options = [*options, f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    return compiled(compiler, folder, sources, options)


def run(*command):
    # A leak check needs ptrace, which containers forbid.
    env = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


def works(sanitizer, folder):
    """Whether the library is there and runs: a hardened system can forbid its memory map."""
    empty = folder / "empty.cc"
    empty.write_text("int main() {}")
    try:
        return run(sanitized(sanitizer, folder, [empty])).returncode == 0
    except subprocess.CalledProcessError:
        return False


@pytest.mark.parametrize(
    ("sanitizer", "vectors"), [("address", "wide"), ("undefined", "narrow"), ("thread", "wide")]
)
def test_nothing_is_found(sanitizer, vectors, tmp_path):
    if not works(sanitizer, tmp_path):
        pytest.skip(f"a program with -fsanitize={sanitizer} can't be linked or doesn't run here")
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    options = [*LEVEL, *(["-march=x86-64-v3"] if x86 and vectors == "wide" else [])]
    result = run(sanitized(sanitizer, tmp_path, SOURCES, options))
    if result.returncode == 77:
        pytest.skip("this machine can't run AVX2")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "all calls ran" in result.stdout


def test_on_arm(tmp_path):
    """With NEON, in an emulator: every result within four units of float64."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if not compiler or not emulator:
        pytest.skip("g++-aarch64-linux-gnu or qemu-user is not installed")
    options = [*LEVEL, "-static"]  # so that it runs without Arm's libraries
    result = run(emulator, compiled([compiler], tmp_path, SOURCES, options), "compare")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "all calls ran" in result.stdout
