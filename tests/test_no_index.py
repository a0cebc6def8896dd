"""No text asks a package index for this package: none has it, and whoever claims its name there could run code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

_ASKED_BY_NAME = re.compile(
    r"pip3?[\"' ](?:[^\n`]*[\"' ])?(?:install|wheel|download)\b[^\n`#]*?(?<![\w/.-])clip[-_]defense(?![\w./-])"
)
_TEXTS = {".py", ".md", ".toml", ".yaml", ".yml", ".json", ".ipynb", ".txt", ".cff", ".js", ""}


def _asks_an_index(text: str) -> list[str]:
    """The commands of a text in which pip looks this package up by its name, anywhere but in a folder."""
    lines = text.replace("\\\\\n", " ").replace("\\\n", " ").splitlines()
    return [line for line in lines if _ASKED_BY_NAME.search(line) and "--no-index" not in line]


def test_no_text_asks_a_package_index_for_this_package() -> None:
    outside = re.compile(r"build|dist|results|__pycache__|\.(?!ci$|github$).*")
    texts = [
        path
        for path in ROOT.rglob("*")
        if path.is_file()
        and path.suffix in _TEXTS
        and path != Path(__file__)
        and not any(outside.fullmatch(part) for part in path.relative_to(ROOT).parent.parts)
    ]
    assert {path.name for path in texts} >= {"README.md", "layouts.py", "serve.md", "run", "errors.py"}
    found = {str(path.relative_to(ROOT)): _asks_an_index(path.read_text("utf-8", "replace")) for path in texts}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    ("text", "n_found"),
    [
        ('pip install "clip-defense[onnx]"', 1),
        ("python -m pip wheel -w wheels clip_defense==0.2.0", 1),
        ('RUN pip install --no-cache-dir \\\n    "clip-defense[onnx]"', 1),
        ('["pip", "install", "clip-defense"]', 1),
        ('pip install --no-index "clip-defense[onnx]"', 0),
        ('pip install -e "/home/me/clip-defense[onnx]"', 0),
        ('pip install "clip_defense-0.2.0-py3-none-any.whl[onnx]"', 0),
        ("pip install torch  # clip-defense is not asked for", 0),
    ],
)
def test_what_asks_an_index_is_found(text: str, n_found: int) -> None:
    assert len(_asks_an_index(text)) == n_found


def test_what_a_bundle_hands_to_pip_comes_from_a_folder_of_wheels() -> None:
    from defense.export import layouts

    requirements = layouts._requirements().splitlines()
    assert (
        "--no-index" in requirements[: requirements.index(next(line for line in requirements if line[0] not in "#-"))]
    )
    for image in (layouts._COMMAND, layouts._PREDICTOR):
        assert _asks_an_index(layouts._dockerfile(image)) == []
        assert "--no-index" in layouts._dockerfile(image)
