"""The package: its public names, imports and versions."""

import importlib.metadata
import inspect
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import jaxnorm as jn

ROOT = Path(__file__).parent.parent


def test_importing_the_package_imports_no_flax():
    code = "import sys, jaxnorm; sys.exit('flax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_modules_import_no_scipy():
    """It comes with JAX today, but JAX does not promise that."""
    code = "import sys, jaxnorm.linen, jaxnorm.nnx; sys.exit('scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_all_is_sorted_and_whole():
    assert jn.__all__ == sorted(jn.__all__)
    public = {name for name, value in vars(jn).items() if callable(value) and name[0] != "_"}
    assert public == set(jn.__all__)


def test_version_is_the_installed_one():
    assert jn.__version__ == importlib.metadata.version("jaxnorm")


def test_a_module_is_looked_for_in_the_wrong_place():
    with pytest.raises(AttributeError, match=r"modules are in jaxnorm\.nnx and jaxnorm\.linen"):
        jn.BatchNorm  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(AttributeError, match="has no attribute 'layernorm'"):
        jn.layernorm  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("name", ["README.md", "docs/index.md"])
def test_errors_in_readme_are_those_of_the_page(name):
    """Rounded to two digits: Flax, PyTorch and the kernel."""
    text, page = ((ROOT / file).read_text() for file in (name, "docs/numerics.md"))
    rows = re.findall(r"^\| ((?:mean|std) [^|]*) \| (.*) \|$", text, re.MULTILINE)
    assert len(rows) == 4
    for kind, cells in rows:
        line = re.search(rf"^\| {kind} \| (.*) \|$", page, re.MULTILINE)
        assert line
        exact = [float(cell) for cell in line[1].split("|")]
        given = [float(cell.split()[0]) for cell in cells.split("|")]
        np.testing.assert_allclose(given, [exact[4], exact[6], exact[0]], rtol=0.06)


def test_the_code_in_readme_runs():
    readme = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert blocks
    for block in blocks:
        subprocess.run([sys.executable, "-c", block], check=True)


@pytest.mark.parametrize("name", jn.__all__)
def test_is_documented(name):
    doc = inspect.getdoc(getattr(jn, name))
    assert doc
    if name.endswith("_norm") and not name.startswith("init_"):
        for part in ("Args:", "Returns:", "Raises:", "Examples:", "References:"):
            assert part in doc
        assert "arXiv" in doc or "NeurIPS 2012" in doc  # local response norm is not there


def test_an_argument_means_the_same_in_every_function():
    functions = [getattr(jn, name) for name in jn.__all__ if inspect.isfunction(getattr(jn, name))]
    signatures = [inspect.signature(function).parameters for function in functions]
    norms = [one for one in signatures if {"x", "params", "epsilon", "where"} <= set(one)]
    assert len(norms) >= 7
    keywords = {"where": None, "feature_axis": -1, "implementation": None}
    for parameters in signatures:
        for name in keywords.keys() & parameters.keys():
            assert parameters[name].default == keywords[name]
            assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
