"""The site: `python -m sphinx -W docs docs/_build`, with the extra 'docs'. Nothing is fetched."""

import os
import sys
from pathlib import Path

import jaxnorm

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

project = "jaxnorm"
author = project_copyright = "The jaxnorm authors"
version = release = jaxnorm.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "site_parts",
]
if os.environ.get("JAXNORM_DOCS_ONLINE"):  # links to the pages of JAX and Flax
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "jax": ("https://docs.jax.dev/en/latest", None),
        "flax": ("https://flax.readthedocs.io/en/latest", None),
    }
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath", "amsmath", "html_image"]
myst_heading_anchors = 4
html_math_renderer = "mathml"
default_role = "code"
autodoc_member_order = "alphabetical"
autodoc_typehints = "none"
autodoc_default_options = {"show-inheritance": True}
napoleon_use_ivar = True
napoleon_attr_annotations = False
copybutton_exclude = ".linenos, .gp, .go"
html_theme = "furo"
html_title = "jaxnorm"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["axes.js", "which_norm.js"]
html_show_sourcelink = False
html_domain_indices = False
templates_path = []
