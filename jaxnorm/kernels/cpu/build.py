"""Compile the kernel, during `pip install` or later.

    python -m jaxnorm.kernels.cpu.build

The environment variable CXX sets the compiler, CXXFLAGS adds flags. This file runs before jaxnorm
is installed, so it imports nothing of jaxnorm.
"""

import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
LIBRARY = HERE / "_norms.so"
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]


def build(library: Path = LIBRARY, flags: Sequence[str] = ()) -> list[str]:
    """Compile the kernel into `library`; if that fails, leave the file unchanged.

    Returns:
      The targets that the kernel is compiled for. Targets that the compiler lacks are left out.

    Raises:
      RuntimeError: there is no compiler, or it failed.
    """
    compiler = find_compiler()
    if not compiler:
        raise RuntimeError("no C++ compiler was found")
    import jaxlib  # for XLA's headers

    flags = [*FLAGS, *flags, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    include = str(Path(jaxlib.__file__).parent / "include")
    handlers = ["handlers.cc", "-isystem", include]
    targets = {"Baseline": []}
    if platform.machine().lower() in ("x86_64", "amd64"):
        # GCC 12 warns of variables in its own header.
        candidates = {
            "Avx2": ["-march=x86-64-v3"],
            "Avx512": ["-march=x86-64-v4", "-Wno-maybe-uninitialized"],
        }
        for target, options in candidates.items():
            if _accepts(compiler, options):
                targets[target] = options
                handlers.append(f"-DJAXNORM_{target.upper()}")
    # target.cc is compiled once for each target; handlers.cc picks the best one at run time.
    sources = [handlers]
    for target, options in targets.items():
        names = [f"-DJAXNORM_TARGET={target.lower()}", f"-DJAXNORM_NAME=k{target}"]
        sources.append(["target.cc", *names, *options])
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        objects = [f"{folder}/{number}.o" for number in range(len(sources))]
        commands = [
            [*compiler, *flags, *options, "-c", str(HERE / source), "-o", output]
            for (source, *options), output in zip(sources, objects, strict=True)
        ]
        list(pool.map(_run, commands))
        _run([*compiler, *flags, "-shared", *objects, "-o", f"{folder}/norms.so"])
        # Copied into the same folder first, because only a move within a file system is atomic.
        unfinished = library.with_name(f"{library.name}.{os.getpid()}.tmp")
        try:
            shutil.copy(f"{folder}/norms.so", unfinished)
            unfinished.replace(library)
        finally:
            unfinished.unlink(missing_ok=True)
    return [target.lower() for target in targets]


def find_compiler() -> list[str] | None:
    """Return the command of the C++ compiler, or None if there is none."""
    if shlex.split(os.environ.get("CXX", "")):
        return shlex.split(os.environ["CXX"])
    paths = (shutil.which(name) for name in ("c++", "g++", "clang++"))
    return next(([path] for path in paths if path), None)


def _accepts(compiler: list[str], options: list[str]) -> bool:
    """Return whether the compiler has these options: old ones lack the newer targets of x86-64."""
    command = [*compiler, *options, "-fsyntax-only", "-x", "c++", os.devnull]
    try:
        _run(command)
    except RuntimeError:
        return False
    return True


def _run(command: list[str]) -> None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise RuntimeError(f"{command[0]} could not be run: {error.strerror}") from error
    if result.returncode:
        lines = result.stderr.splitlines() or ["it printed nothing"]
        reason = next((line for line in lines if "error" in line), lines[0])
        raise RuntimeError(f"{command[0]} failed to compile it: {reason}")


if __name__ == "__main__":
    try:
        targets = build()
    except (RuntimeError, OSError, ImportError) as error:
        raise SystemExit(f"The kernel is not built: {error}.") from None
    except KeyboardInterrupt:
        raise SystemExit("Interrupted: the kernel is unchanged.") from None
    print(f"Built {LIBRARY} for {', '.join(targets)}")
