"""The package as one imports it."""

import importlib.metadata
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import jaxnorm as jn


def test_importing_the_package_imports_no_flax():
    code = "import sys, jaxnorm; sys.exit('flax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_all_is_sorted_and_whole():
    assert jn.__all__ == sorted(jn.__all__)
    public = {name for name, value in vars(jn).items() if callable(value)}
    assert public == set(jn.__all__)


def test_version_is_the_installed_one():
    assert jn.__version__ == importlib.metadata.version("jaxnorm")


def test_the_code_in_readme_runs():
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert blocks
    for block in blocks:
        subprocess.run([sys.executable, "-c", block], check=True)


@pytest.mark.parametrize("name", jn.__all__)
def test_is_documented(name):
    doc = inspect.getdoc(getattr(jn, name))
    assert doc
    if name.endswith("_norm"):
        for part in ("Args:", "Returns:", "Raises:", "Examples:", "References:", "arXiv"):
            assert part in doc


def test_an_argument_means_the_same_in_every_function():
    norms = [getattr(jn, name) for name in jn.__all__ if name.endswith("_norm")]
    assert len(norms) == 7
    for norm in norms:
        parameters = inspect.signature(norm).parameters
        assert {"x", "params", "epsilon", "where"} <= set(parameters)
        assert parameters["where"].default is None
        assert parameters["where"].kind is inspect.Parameter.KEYWORD_ONLY
