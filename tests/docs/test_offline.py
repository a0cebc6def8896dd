"""The check that a built site loads nothing from other hosts."""

from __future__ import annotations

import runpy

import pytest

from .pages import ROOT


@pytest.fixture(scope="module")
def loads():
    return runpy.run_path(str(ROOT / ".ci" / "offline.py"))["loads"]


@pytest.mark.parametrize(
    "page",
    [
        '<script src="https://elsewhere.example/a.js"></script>',
        '<link rel="stylesheet" href="//elsewhere.example/a.css">',
        '<link rel="preconnect" href="https://elsewhere.example">',
        '<img src="HTTP://elsewhere.example/a.png">',
        '<p style="background: url(https://elsewhere.example/a.png)">',
        "<style>@import 'https://elsewhere.example/a.css';</style>",
    ],
)
def test_what_a_page_loads_from_elsewhere_is_found(loads, tmp_path, page):
    (tmp_path / "a.html").write_text(f"<html>{page}</html>")
    assert list(loads(tmp_path)) == ["a.html"]


def test_fonts_of_a_stylesheet_are_loads(loads, tmp_path):
    (tmp_path / "a.css").write_text("@font-face { src: url('https://elsewhere.example/a.woff2'); }")
    assert loads(tmp_path) == {"a.css": ["https://elsewhere.example/a.woff2"]}


def test_links_and_what_lies_beside_a_page_are_no_loads(loads, tmp_path):
    (tmp_path / "a.html").write_text(
        '<link rel="canonical" href="https://here.example/"><link rel="stylesheet" href="_static/a.css">'
        '<a href="https://elsewhere.example">there</a><img src="a.png"><img src="data:image/png;base64,AA==">'
    )
    assert loads(tmp_path) == {}


def test_a_folder_without_a_page_is_no_site(loads, tmp_path):
    with pytest.raises(SystemExit, match="holds no site"):
        loads(tmp_path)
