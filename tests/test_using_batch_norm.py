"""docs/using_batch_norm.md: its code runs, and its statements on other libraries hold."""

import importlib
import inspect
import re
from pathlib import Path

import flax.linen as nn
import jax
import pytest

import jaxnorm as jn

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "using_batch_norm.md").read_text()
ROWS = {  # of the table: module, class, and its names of momentum and epsilon
    "PyTorch": ("torch.nn", "BatchNorm2d", "momentum", "eps"),
    "Keras": ("keras.layers", "BatchNormalization", "momentum", "epsilon"),
    "Haiku": ("haiku", "BatchNorm", "decay_rate", "eps"),
    "Equinox": ("equinox.nn", "BatchNorm", "momentum", "eps"),
}


@pytest.mark.thorough
def test_the_code_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) >= 12
    names = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec("\n".join(blocks), names)
    assert "never updated" in capsys.readouterr().out


def row(library):
    """The cells of a line of the table of other libraries."""
    line = re.search(rf"^\| {library}[^|]*\|(.*)\|$", PAGE, re.MULTILINE)
    assert line
    return [cell.strip() for cell in line[1].split("|")]


def numbers(text):
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?(?:e-\d+)?", text)]


@pytest.mark.parametrize("library", ROWS)
def test_defaults_of_other_libraries(library, monkeypatch):
    module, name, momentum, epsilon = ROWS[library]
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    extra = "peers" if library == "PyTorch" else "benchmarks"
    pytest.importorskip(module.split(".")[0], reason=f"{library} is in the extra {extra!r}")
    cls = getattr(importlib.import_module(module), name)
    given = inspect.signature(cls.__init__).parameters
    cells = row(library)
    default = given[momentum].default
    if library == "PyTorch":
        assert numbers(cells[0]) == [1, 1 - default]
    elif default is not inspect.Parameter.empty:
        assert numbers(cells[0]) == [default]
    assert numbers(cells[2]) == [given[epsilon].default]


def test_defaults_of_ours_and_flax():
    momentum, epsilon = numbers(row("jaxnorm, Flax")[0]), numbers(row("jaxnorm, Flax")[2])
    ours = inspect.signature(jn.batch_norm).parameters
    assert momentum == [ours["momentum"].default] == [nn.BatchNorm().momentum]
    assert epsilon == [ours["epsilon"].default] == [nn.BatchNorm().epsilon]
    assert abs(0.99**100 - 1 / 3) < 0.04
    assert 0.9**100 < 1e-4


def test_links_lead_somewhere():
    headings = {
        path.name: {
            re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-")
            for heading in re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
        }
        for path in DOCS.glob("*.md")
    }
    links = re.findall(r"\]\(([\w.]*)(?:#([\w-]+))?\)", PAGE)
    assert links
    for file, heading in links:
        assert (file or "using_batch_norm.md") in headings
        assert not heading or heading in headings[file or "using_batch_norm.md"]
