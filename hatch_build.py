"""Compile the CPU kernel while jaxnorm is installed, if there is a C++ compiler.

If there is no compiler, or if it fails, jaxnorm is installed without the kernel. The reason is
stored next to the kernel's source, and `jaxnorm.implementations()` reports it as the reason of the
wheel: pip keeps wheels, and may install this one on a machine that has a compiler.
JAXNORM_BUILD_KERNEL=1 makes this an error, =0 installs without the kernel.
"""

import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path(__file__).parent / "jaxnorm" / "kernels" / "cpu"


class Kernel(BuildHookInterface):
    """The Hatch hook for `pip install`, editable or not."""

    def dependencies(self) -> list[str]:
        """Return the package with XLA's headers, jaxlib, if there is a compiler."""
        # A library that is built with older headers runs with a newer XLA, but not vice versa.
        oldest = "jaxlib==0.10.*" if sys.version_info < (3, 15) else "jaxlib"
        return [oldest] if _cpu().find_compiler() else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile the kernel into the wheel, or for an editable install into the source tree."""
        self.temporary = tempfile.TemporaryDirectory()  # removed after the wheel is written
        folder = FOLDER if version == "editable" else Path(self.temporary.name)
        library, reason = folder / "_norms.so", folder / "_not_built.txt"
        setting = os.environ.get("JAXNORM_BUILD_KERNEL")
        try:
            if setting == "0":
                raise RuntimeError("JAXNORM_BUILD_KERNEL=0 left it out")
            if not _is_newer(library):  # pip calls this twice, first for the metadata
                _cpu().build(library)
            reason.unlink(missing_ok=True)
        except (RuntimeError, OSError, ImportError) as error:
            if setting == "1":
                raise
            library.unlink(missing_ok=True)
            reason.write_text(str(error))
            self.app.display_warning(f"jaxnorm is installed without its CPU kernel: {error}")
        else:
            # The tag of this machine, or of MACOSX_DEPLOYMENT_TARGET, which the compiler uses too.
            _, platform = self.build_config.builder.get_best_matching_tag().rsplit("-", 1)
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{platform}"
        for path in (library, reason):
            if path.exists() and folder != FOLDER:
                build_data["force_include"][str(path)] = f"jaxnorm/kernels/cpu/{path.name}"


def _is_newer(library: Path) -> bool:
    """Return whether the library is newer than its sources."""
    sources = [path for path in FOLDER.iterdir() if path.suffix in (".cc", ".h", ".py")]
    last_change = max(path.stat().st_mtime for path in sources)
    return library.exists() and library.stat().st_mtime > last_change


def _cpu() -> Any:
    """Load the module jaxnorm.kernels.cpu.build without importing the package."""
    spec = importlib.util.spec_from_file_location("build_of_kernel", FOLDER / "build.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
