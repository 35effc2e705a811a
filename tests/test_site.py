"""The site builds without a warning; its code runs; its pictures match the layouts."""

import functools
import http.server
import importlib
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxnorm
from jaxnorm.core.layouts import group_layout

DOCS = Path(__file__).parent.parent / "docs"
OWN_TESTS = {"using_batch_norm", "devices", "left_out"}  # whose blocks others run
BLOCKS = {
    path.relative_to(DOCS).with_suffix("").as_posix(): blocks
    for path in sorted(DOCS.rglob("*.md"))
    if (blocks := re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL))
}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the site, built with warnings as errors."""
    pytest.importorskip("sphinx", reason="Sphinx is in the extra 'docs'")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", DOCS, out]
    command += ["-d", tmp_path_factory.mktemp("doctrees")]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    subprocess.run([str(word) for word in command], env=environment, check=True)
    return out


# The front page has README's code, which test_package.py runs.
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.thorough] if page == "index" else ())
        for page in sorted(BLOCKS.keys() - OWN_TESTS)
    ],
)
def test_the_code_runs(page, capsys):
    names = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec("\n".join(BLOCKS[page]), names)
    capsys.readouterr()


def test_every_public_name_has_its_place(site):
    from sphinx.util.inventory import InventoryFile

    found = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="")
    names = {name for kind in found.data for name in found.data[kind]}
    modules = ("jaxnorm", "jaxnorm.linen", "jaxnorm.nnx", "jaxnorm.convert", "jaxnorm.equinox")
    public = {
        f"{module}.{name}": getattr(importlib.import_module(module), name)
        for module in modules
        for name in importlib.import_module(module).__all__
    }
    documented = {id(value) for name, value in public.items() if name in names}
    assert [name for name, value in public.items() if id(value) not in documented] == []


def test_signatures_have_names(site):
    for page in (site / "api").glob("*.html"):
        signatures = re.findall(r'<dt class="sig.*?</dt>', page.read_text(), re.DOTALL)
        text = re.sub(r"<[^>]*>", "", " ".join(signatures))
        assert not re.search(r"&lt;|mappingproxy|_jax", text), page


def test_nothing_is_fetched_from_elsewhere(site):
    for page in site.rglob("*.html"):
        sources = re.findall(r'(?:src|rel="stylesheet"[^>]*href)="(https?:)', page.read_text())
        assert not sources, page


def test_pages_are_listed_for_language_models(site):
    listed = re.findall(r"\]\(([^)]*)\)", (site / "llms.txt").read_text())
    assert {"index.html", "which_norm.html", "norms/layer_norm.html"} <= set(listed)
    assert all((site / page).exists() for page in listed)
    for line in (site / "llms.txt").read_text().splitlines():
        assert re.fullmatch(r"- \[.*\]\(\S*\)(: \S.{15,}\.)?|[^-].*|", line)


def same_group(name, shape):
    """Which elements move the result of which, by a call: [moved, result]."""
    jn, x = jaxnorm, np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    call = {
        "batch_norm": lambda x: jn.batch_norm(x, jn.init_batch_norm_state(shape[-1]))[0],
        "layer_norm": jn.layer_norm,
        "rms_norm": jn.rms_norm,
        "group_norm": lambda x: jn.group_norm(x, num_groups=2),
        "instance_norm": jn.instance_norm,
    }[name]
    jacobian = jax.jacobian(call)(x).reshape(x.size, x.size)
    return np.asarray(jacobian != 0)


@pytest.mark.parametrize(
    "name", ["batch_norm", "layer_norm", "rms_norm", "group_norm", "instance_norm"]
)
def test_cells_of_one_number_share_statistics(name):
    axes = importlib.import_module("axes")
    shape = (2, 2, 4)
    numbers = axes.groups(axes.LAYOUTS[name](shape)).ravel()
    np.testing.assert_array_equal(numbers[:, None] == numbers, same_group(name, shape))
    svg = axes.picture(name, shape)
    assert re.findall(r">(\d+)</text>", svg) == [str(number) for number in numbers]


def test_pictures_of_the_pages_are_those_of_the_script(site):
    axes = importlib.import_module("axes")
    for name in axes.LAYOUTS:
        page = DOCS / "norms" / f"{name}.md"
        (link,) = re.findall(r"!\[[^\]]+\]\((\w+\.svg)\)", page.read_text())
        assert (page.parent / link).read_text() == axes.file(name)
        built = (site / "norms" / f"{name}.html").read_text()
        assert axes.widget(name) in built
        assert link not in built


@pytest.fixture
def browser_page(site):
    """A function that opens a page in Chromium, where nothing else may be asked for."""
    chromium = os.environ.get("JAXNORM_CHROMIUM")
    if not chromium:
        pytest.skip("JAXNORM_CHROMIUM names no browser")
    playwright = importlib.import_module("playwright.sync_api")
    handler = functools.partial(Quiet, directory=site)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    here = f"http://127.0.0.1:{server.server_port}/"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with server, playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page, problems = browser.new_page(), []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda r: problems.append(r.url) if here not in r.url else None)

        def open_page(name):
            page.goto(here + name)
            return page

        yield open_page
        browser.close()
        server.shutdown()
    assert [problem for problem in problems if not problem.startswith("data:")] == []


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A server of files that prints nothing."""

    def log_message(self, format, *args):
        """Say nothing."""


def test_a_picture_follows_the_shape_that_is_typed(browser_page):
    axes = importlib.import_module("axes")
    for name in axes.LAYOUTS:
        page = browser_page(f"norms/{name}.html")
        for shape in [(2, 3, 4), (3, 2, 2, 6), (4, 6), (1, 2)]:
            layout = axes.LAYOUTS[name](shape)
            page.fill("input.shape", ", ".join(map(str, shape)))
            assert drawn(page) == [str(number) for number in axes.groups(layout).ravel()]
            assert page.inner_text(".axes-widget output") == axes.summary(name, layout)
    page = browser_page("norms/group_norm.html")
    for groups, separator in (("3", " "), ("6", "x")):
        page.fill("input.shape", separator.join("236"))
        page.fill("input.groups", groups)
        layout = group_layout((2, 3, 6), int(groups))
        assert drawn(page) == [str(number) for number in axes.groups(layout).ravel()]
    wrong = {"2, n": "Type sizes", "7": "two axes", "2, 0": "1 or more", "2, 3": "must divide"}
    for text, said in wrong.items():
        page.fill("input.shape", text)
        assert said in page.inner_text(".axes-widget output")
        where = "input.groups" if said == "must divide" else "input.shape"
        assert page.get_attribute(where, "aria-invalid") == "true"
        assert not page.is_visible("svg.axes")
    page.fill("input.shape", "99, 6000")
    said = page.inner_text(".axes-widget output")
    assert said == "594 means, each of 1000 elements; too many to draw"
    assert page.get_attribute("input.shape", "aria-invalid") == "false"


def drawn(page):
    """The numbers in the picture."""
    return page.eval_on_selector_all("svg.axes text.n", "all => all.map(t => t.textContent)")


def test_the_table_leads_to_one_answer(browser_page):
    page = browser_page("which_norm.html")
    shown = lambda: [
        row.inner_text() for row in page.query_selector_all("tbody tr") if row.is_visible()
    ]
    network, batch, depends = page.query_selector_all(".controls select")
    rows = len(shown())
    assert rows > 10
    network.select_option("recurrent")
    (answer,) = shown()
    assert "Layer norm inside the cell" in answer
    assert "lstm.py" in answer
    network.select_option("convolutional")
    batch.select_option("more than 32")
    depends.select_option("yes")
    (answer,) = shown()
    assert "Batch norm" in answer
    depends.select_option("no")
    (answer,) = shown()
    assert "Layer norm or group norm" in answer
    for select in (network, batch, depends):
        select.select_option("any")
    assert len(shown()) == rows


def test_the_search_finds(browser_page):
    found = {
        "recalibrate": "Using batch norm",
        "nan": "When something fails",
        "freeze batch norm": "Using batch norm",
        "unbound axis name": "When something fails",
        "pytorch momentum": "Porting",
        "layer norm channels": "Layer norm",
        "adaptive layer norm": "Layer norm",
    }
    for words, title in found.items():
        page = browser_page(f"search.html?q={words}")
        page.wait_for_selector("ul.search li a")
        page.wait_for_function("document.querySelector('.search-summary').textContent.match(/\\d/)")
        titles = [link.inner_text() for link in page.query_selector_all("ul.search li > a")]
        assert title in titles[:5], (words, titles)
        assert not {"Changelog", "Benchmark results"} & set(titles)
