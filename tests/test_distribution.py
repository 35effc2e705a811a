"""The files of a distribution."""

from pathlib import Path

import pytest

import jaxnorm as jn

ROOT = Path(__file__).parent.parent


def test_the_sdist_has_what_the_kernel_is_compiled_from_and_no_figures():
    sdist = pytest.importorskip("hatchling.builders.sdist", reason="hatchling is not installed")
    builder = sdist.SdistBuilder(str(ROOT))
    files = {Path(file.distribution_path) for file in builder.recurse_included_files()}
    kernel = {path.relative_to(ROOT) for path in (ROOT / "jaxnorm/kernels/cpu").glob("*.[ch]*")}
    assert len(kernel) > 10
    assert files >= kernel | {Path("hatch_build.py")}
    assert {path.suffix for path in files} <= {".py", ".typed", ".cc", ".h", ".md", ".cff"}
    assert sum((ROOT / path).stat().st_size for path in files) < 1e6
    assert builder.metadata.version == jn.__version__
