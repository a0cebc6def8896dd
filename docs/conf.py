"""The documentation site: `sphinx-build -W --keep-going -b html docs build/site`.

Pages are written so that they read well in the checkout, too: their links go to files of the checkout. What lies
outside this folder has a page here that includes it, and links are turned to that page.
"""

from __future__ import annotations

import re
import runpy
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

HERE = Path(__file__).parent

project = "clip-defense"
author = "The clip-defense authors"
project_copyright = "2026, The clip-defense authors. MIT license"
release = version_of("clip-defense")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}
myst_heading_anchors = 4
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True
nb_output_stderr = "remove"  # progress bars, and what libraries say of them
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
python_use_unqualified_type_names = True
napoleon_use_rtype = False
napoleon_use_ivar = True

html_theme = "sphinx_book_theme"
html_title = f"clip-defense {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "use_download_button": False,
    "use_fullscreen_button": False,
    "show_toc_level": 2,
    "show_navbar_depth": 1,
    "article_header_start": ["toggle-primary-sidebar.html"],
}

PAGE_OF = {
    "../benchmarks/RESULTS.md": "all-results.md",
    "../CHANGELOG.md": "changelog.md",
    "../CONTRIBUTING.md": "contributing.md",
    "../SECURITY.md": "security.md",
    "../demo/README.md": "demo.md",
}
"""File outside of this folder, as pages link to it -> the page that includes it."""


def put_in(app: Sphinx, docname: str, source: list[str]) -> None:
    """Turn links that lead out of this folder to its pages, and write out what only the code knows."""
    text = source[0]
    for outside, page in PAGE_OF.items():
        text = text.replace(f"]({outside}", f"]({page}")
    if docname == "cli":
        text = text.replace("<!-- commands -->", runpy.run_path(str(HERE / "tables.py"))["commands"]())
    source[0] = text


def plain(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Show a docstring as it is written: |S| is no substitution, and drawings and tables stand as they were drawn."""
    shown: list[str] = []
    is_drawn = False
    for before, line in zip(["", *lines], lines, strict=False):
        starts = not before.strip() and bool(re.match(r" {4}\S|\|", line))
        is_drawn = starts or (is_drawn and (not line.strip() or bool(re.match(r" {4}|\|", line))))
        if starts:
            shown += ["::", ""]
        if is_drawn:
            shown.append(line if line.startswith("    ") else f"    {line}".rstrip())
        else:
            shown.append(re.sub(r"(?<!\\)[|*]", lambda found: "\\" + found[0], line))
    lines[:] = shown


def setup(app: Sphinx) -> None:
    """Connect the hooks."""
    app.connect("source-read", put_in)
    app.connect("autodoc-process-docstring", plain, priority=100)  # before napoleon
