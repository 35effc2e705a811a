"""What the site has beyond Markdown: formulas as MathML, two directives, and llms.txt."""

import html
import inspect
import json
import os
import re
from pathlib import Path
from typing import Any

import axes
from docutils import nodes
from docutils.parsers.rst import Directive
from latex2mathml.converter import convert

HERE = Path(__file__).parent
OUTSIDE = {
    "examples": "examples/README.md",
    "how_it_works": "CONTRIBUTING.md",
    "changelog": "CHANGELOG.md",
}


class Axes(Directive):
    """`{axes} batch_norm`: which elements share statistics, for the shape that is typed."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the picture as HTML."""
        return [nodes.raw("", axes.widget(self.arguments[0]), format="html")]


class Choices(Directive):
    """`{choices}`: the answers of which_norm.json, of which a script leaves those that fit."""

    def run(self) -> list[nodes.Node]:
        """Return questions and answers as HTML."""
        data = json.loads((HERE / "which_norm.json").read_text())
        answers = "".join(_answer(row, data["questions"]) for row in data["answers"])
        questions = html.escape(json.dumps(data["questions"]))
        text = f'<div class="choices" data-questions="{questions}">{answers}</div>'
        return [nodes.raw("", text, format="html")]


def _answer(row: dict[str, Any], questions: dict[str, Any]) -> str:
    fits = " ".join(f'data-{name}="{" ".join(row[name])}"' for name in questions if name in row)
    options = {name: question["options"] for name, question in questions.items()}
    network = ", ".join(options["network"][value] for value in row["network"])
    batch = [options["batch"][value] for value in row["batch"]]
    examples = "any number of examples" if len(batch) > 2 else f"{' or '.join(batch)} examples"
    alone = {("yes",): "; results may depend on each other", ("no",): "; each by itself"}
    use = f"{network}; {examples}{alone.get(tuple(row['alone']), '')}"
    return (
        f'<div class="answer" {fits}><h4>{html.escape(row["norm"])}</h4>'
        f'<p class="use">{html.escape(use)}</p>'
        f"<p>{html.escape(row['why'])}</p><pre>{html.escape(row['code'])}</pre>"
        f'<p class="several" data-devices="several">On several devices: '
        f"{html.escape(row.get('several', 'nothing to do, each example is on one of them.'))}</p>"
        f'<p>Seen in <a href="examples.html">{html.escape(row["run"])}</a>.</p></div>'
    )


def _inline_math(self, node: nodes.Element) -> None:
    self.body.append(convert(node.astext()))
    raise nodes.SkipNode


def _block_math(self, node: nodes.Element) -> None:
    self.body.append(convert(node.astext(), display="block"))
    raise nodes.SkipNode


def _constructor(app, what, name, obj, options, signature, returned):
    """The arguments of a class are those of its constructor, not of Flax's metaclass."""
    if what != "class" or not signature or "*args" not in signature:
        return None
    parameters = list(inspect.signature(obj.__init__).parameters.values())[1:]
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    return str(inspect.Signature(plain)), returned


def _skips(app, what, name, obj, skip, options) -> bool | None:
    """Leave out the fields of a NamedTuple, which its docstring describes."""
    return True if str(getattr(obj, "__doc__", "")).startswith("Alias for field") else None


def _as_restructured_text(app, what, name, obj, options, lines: list[str]) -> None:
    """Indented lines after a paragraph of a docstring are code; and |x| is no substitution."""
    sections = next((i for i, x in enumerate(lines) if re.fullmatch(r"[A-Z]\w+:", x)), len(lines))
    for place, line in enumerate(lines):
        if not line.startswith(">>>") and not (place < sections and line.startswith("    ")):
            lines[place] = line.replace("|", r"\|")
    for place in range(len(lines) - 2, 0, -1):
        before, blank, after = lines[place - 1 : place + 2]
        is_paragraph = before.strip() and not before.startswith("  ") and not before.endswith("::")
        if is_paragraph and not blank.strip() and after.startswith("    "):
            lines[place:place] = ["", "::"]


def _read_from_outside(app, page: str, source: list[str]) -> None:
    """A page that stands elsewhere in the repository, with its links as they are from here."""
    if page not in OUTSIDE:
        return
    file = HERE.parent / OUTSIDE[page]
    pages = {(HERE.parent / path).resolve(): f"{name}.md" for name, path in OUTSIDE.items()}

    def relative(match: re.Match) -> str:
        path, hash_, heading = match[2].partition("#")
        if "://" in path or not path:
            return match[0]
        target = (file.parent / path).resolve()
        return match[1] + pages.get(target, os.path.relpath(target, HERE)) + hash_ + heading

    text = re.sub(r'<a href="[^"]*">(<img [^>]*>)</a>', r"\1", file.read_text())
    source[0] = re.sub(r'(\]\(|src=")([^)"]+)', relative, text)


def _write_llms(app, error: Exception | None) -> None:
    """A list of all pages with their first sentences, for language models."""
    if error or app.builder.name != "html":
        return
    lines = ["# jaxnorm", "", "> Normalization for JAX and Flax.", "", "## Pages", ""]
    for page in sorted(app.env.found_docs):
        doctree = app.env.get_doctree(page)
        first = next((p.astext() for p in doctree.findall(nodes.paragraph)), "")
        sentence = " ".join(first.split()).partition(". ")[0].rstrip(".:")
        title = app.env.titles[page].astext()
        lines.append(f"- [{title}]({page}.html): {sentence}.")
    (Path(app.outdir) / "llms.txt").write_text("\n".join(lines) + "\n")


def setup(app) -> dict[str, bool]:
    """Tell Sphinx."""
    app.add_directive("axes", Axes)
    app.add_directive("choices", Choices)
    app.add_html_math_renderer("mathml", (_inline_math, None), (_block_math, None))
    # Before napoleon, which moves the sections of a docstring.
    app.connect("autodoc-process-docstring", _as_restructured_text, priority=100)
    app.connect("autodoc-skip-member", _skips)
    app.connect("autodoc-process-signature", _constructor)
    app.connect("source-read", _read_from_outside)
    app.connect("build-finished", _write_llms)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
