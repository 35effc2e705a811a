"""Extend Sphinx: formulas as MathML, pictures of axes that readers change, and llms.txt."""

import inspect
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import axes
from docutils import nodes
from latex2mathml.converter import convert

HERE = Path(__file__).parent
OUTSIDE = {
    "examples": "examples/README.md",
    "changelog": "CHANGELOG.md",
}
TABLES = {"accelerators/table", "benchmarks/table"}
NOT_SEARCHED = {"changelog"} | TABLES
SUMMARY = (
    "Batch, layer, rms, group and instance norm for JAX, and norms related to them, as pure "
    "functions and as drop-in replacements for Flax's modules: accurate where other libraries lose "
    "digits, and with the same result on any number of devices."
)


def _widgets(app, doctree: nodes.document) -> None:
    """Replace the pictures of axes.py by ones that follow a shape that a reader types."""
    for image in list(doctree.findall(nodes.image)):
        path = Path(image["uri"])
        if path.suffix == ".svg" and path.stem in axes.LAYOUTS:
            image.parent.replace_self(nodes.raw("", axes.widget(path.stem), format="html"))


def _inline_math(self, node: nodes.Element) -> None:
    self.body.append(convert(node.astext()))
    raise nodes.SkipNode


def _block_math(self, node: nodes.Element) -> None:
    self.body.append(convert(node.astext(), display="block"))
    raise nodes.SkipNode


def _signature(app, what, name, obj, options, signature, returned):
    """Return the signature as in the source: a class has its constructor's, defaults have names."""
    if not signature or not re.search(r"\*args|<", signature):
        return None
    is_class = what == "class"
    call = obj.__init__ if is_class else obj
    parameters = list(inspect.signature(call).parameters.values())[is_class:]
    plain = [
        p.replace(annotation=inspect.Parameter.empty, default=_named(p.default))
        for p in parameters
        if p.name != "parent"  # of linen, which sets it
    ]
    return str(inspect.Signature(plain)), returned


class _Name(str):
    """The text of a default in a signature."""

    __repr__ = str.__str__


def _named(default: Any) -> Any:
    """Return a default as in the source: functions and types by their names."""
    if default is inspect.Parameter.empty:
        return default
    if isinstance(default, Mapping):
        return dict(default)
    name = getattr(default, "__qualname__", "..." if "<" in repr(default) else None)
    return default if name is None else _Name(name.partition(".<locals>")[0])


def _skips(app, what, name, obj, skip, options) -> bool | None:
    """Skip the fields of a NamedTuple; its docstring describes them."""
    return True if str(getattr(obj, "__doc__", "")).startswith("Alias for field") else None


def _as_restructured_text(app, what, name, obj, options, lines: list[str]) -> None:
    """Mark indented lines after a paragraph as code, and escape |x|, which is a substitution."""
    sections = next((i for i, x in enumerate(lines) if re.fullmatch(r"[A-Z]\w+:", x)), len(lines))
    for place, line in enumerate(lines):
        if not line.startswith(">>>") and not (place < sections and line.startswith("    ")):
            lines[place] = line.replace("|", r"\|")
    for place in range(len(lines) - 2, 0, -1):
        before, blank, after = lines[place - 1 : place + 2]
        is_paragraph = before.strip() and not before.startswith("  ") and not before.endswith("::")
        if is_paragraph and not blank.strip() and after.startswith("    "):
            lines[place:place] = ["", "::"]


def _read(app, page: str, source: list[str]) -> None:
    """Read a page; if its text is elsewhere in the repository, keep only its own toctree."""
    if page in OUTSIDE:
        toctree = "".join(source[0].partition("```{toctree}")[1:])
        source[0] = f"{_from_outside(page)}\n{toctree}"
    if page in NOT_SEARCHED:
        source[0] = f"---\nnosearch: true\n---\n{source[0]}"


def _from_outside(page: str) -> str:
    """Return the text of a file of the repository, with its links relative to docs/."""
    file = HERE.parent / OUTSIDE[page]
    pages = {(HERE.parent / path).resolve(): f"{name}.md" for name, path in OUTSIDE.items()}

    def relative(match: re.Match) -> str:
        path, hash_, heading = match[2].partition("#")
        if "://" in path or not path:
            return match[0]
        target = (file.parent / path).resolve()
        return match[1] + pages.get(target, os.path.relpath(target, HERE)) + hash_ + heading

    return re.sub(r"(\]\()([^)]+)", relative, file.read_text())


def _write_llms(app, error: Exception | None) -> None:
    """Write a list of all pages with their first sentences, for language models."""
    if error or app.builder.name != "html":
        return
    lines = ["# jaxnorm", "", f"> {SUMMARY}", "", "## Pages", ""]
    for page in sorted(app.env.found_docs):
        sentence = "" if page in TABLES else _first_sentence(app.env.get_doctree(page))
        title = app.env.titles[page].astext()
        lines.append(f"- [{title}]({page}.html)" + (f": {sentence}" if sentence else ""))
    (Path(app.outdir) / "llms.txt").write_text("\n".join(lines) + "\n")


def _first_sentence(doctree: nodes.document) -> str:
    """Return the first sentence of the text that is outside of tables, lists and code."""
    for paragraph in doctree.findall(nodes.paragraph):
        sentence = re.match(r".*?\.(?= |$)", " ".join(paragraph.astext().split()))
        before = paragraph.previous_sibling()
        goes_on = isinstance(before, nodes.literal_block)
        if isinstance(paragraph.parent, nodes.section) and sentence and not goes_on:
            return sentence[0]
    return ""


def setup(app) -> dict[str, bool]:
    """Register the extensions with Sphinx."""
    app.add_html_math_renderer("mathml", (_inline_math, None), (_block_math, None))
    # Before napoleon, which moves the sections of a docstring.
    app.connect("autodoc-process-docstring", _as_restructured_text, priority=100)
    app.connect("autodoc-skip-member", _skips)
    app.connect("autodoc-process-signature", _signature)
    app.connect("source-read", _read)
    app.connect("doctree-read", _widgets, priority=100)  # before images are collected
    app.connect("build-finished", _write_llms)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
