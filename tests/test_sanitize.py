"""Every kernel under the sanitizers of addresses, of undefined behaviour, and of threads.

A level is the same source compiled for other vectors, so each sanitizer sees one. Compiling for
them takes most of a minute, so that two of them run only where JAXNORM_SANITIZERS=1 asks for it.
"""

import os
import platform
import subprocess
from pathlib import Path

import pytest

from jaxnorm.kernels.cpu import build

PROGRAM = Path(__file__).with_name("sanitize.cc")
LEVELS = {
    "baseline": ["-DJAXNORM_LEVEL=baseline", "-DJAXNORM_NAME=kBaseline"],
    "avx2": ["-DJAXNORM_LEVEL=avx2", "-DJAXNORM_NAME=kAvx2", "-DJAXNORM_AVX2"],
}


def compiled(sanitizer, folder, sources):
    """A program of (source, its own options)."""
    compiler = build.find_compiler()
    if not compiler:
        pytest.skip("there is no C++ compiler")
    flags = ["-std=c++17", "-O1", "-g1", "-Wno-psabi", "-pthread", "-I", str(build.HERE)]
    flags += [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    objects = [str(folder / f"{source.stem}.o") for source, _ in sources]
    program = str(folder / sources[-1][0].stem)
    commands = [
        [*compiler, *flags, *options, "-c", str(source), "-o", result]
        for (source, options), result in zip(sources, objects, strict=True)
    ]
    for command in (*commands, [*compiler, *flags, *objects, "-o", program]):
        subprocess.run(command, check=True, capture_output=True, text=True)
    return program


def run(program):
    # A leak check needs ptrace, which containers forbid.
    env = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run([program], capture_output=True, text=True, check=False, env=env)


def works(sanitizer, folder):
    """Whether the library is there and runs: a hardened system can forbid its memory map."""
    empty = folder / "empty.cc"
    empty.write_text("int main() {}")
    try:
        return run(compiled(sanitizer, folder, [(empty, [])])).returncode == 0
    except subprocess.CalledProcessError:
        return False


@pytest.mark.parametrize(
    ("sanitizer", "level"), [("address", "avx2"), ("undefined", "baseline"), ("thread", "avx2")]
)
def test_nothing_is_found(sanitizer, level, tmp_path):
    if sanitizer != "address" and os.environ.get("JAXNORM_SANITIZERS") != "1":
        pytest.skip("JAXNORM_SANITIZERS=1 runs it")
    if level == "avx2" and platform.machine().lower() not in ("x86_64", "amd64"):
        level = "baseline"
    if not works(sanitizer, tmp_path):
        pytest.skip(f"a program with -fsanitize={sanitizer} can't be linked or doesn't run here")
    target = ["-march=x86-64-v3"] if level == "avx2" else []
    sources = [(build.HERE / "level.cc", [*LEVELS[level], *target]), (PROGRAM, LEVELS[level])]
    result = run(compiled(sanitizer, tmp_path, sources))
    if result.returncode == 77:
        pytest.skip(f"this machine can't run {level}")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "all kernels ran" in result.stdout
