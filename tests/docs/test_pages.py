"""What README and docs say holds: links lead somewhere, code runs, commands exist, tables are those of the code."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import runpy
import tomllib
from pathlib import Path
from typing import Any

import pytest

import defense

from . import pages
from .pages import DOCS, PAGES, README, ROOT, name_of

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OF_OTHERS = {"--model-repository", "--grpc_max_receive_message_length", "--index-url", "--no-deps"}
"""Options of programs that are not ours."""

every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


# --- links ------------------------------------------------------------------------------------------------------------


def broken(page: Path, text: str) -> list[str]:
    """The links of a page that lead nowhere in the checkout."""
    found = []
    for link in pages.links(text):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = page if not path else (page.parent / path).resolve()
        if (path and not target.exists()) or (
            anchor and anchor not in pages.anchors(text_of(target) if path else text)
        ):
            found.append(link)
    return found


@every_page
def test_every_link_leads_to_a_file_of_the_checkout_and_a_heading_in_it(page):
    assert broken(page, text_of(page)) == []


def test_pages_are_linked_at_all():
    assert len([link for page in PAGES for link in pages.links(text_of(page)) if "://" not in link]) > 60


@pytest.mark.parametrize(
    ("text", "n_broken"),
    [
        ("[a](start.md) [b](start.md#the-drop-in) ![c](../demo/screenshots/try.png)", 0),
        ("[a](missing.md)", 1),
        ("[a](start.md#no-such-heading)", 1),
        ("# Here\n[a](#here) [b](#there)", 1),
        ('<img src="nothing.png" width="1">', 1),
        ("`[a](missing.md)`\n```sh\n[a](missing.md)\n```", 0),
    ],
)
def test_a_broken_link_is_found(text, n_broken):
    assert len(broken(DOCS / "new.md", text)) == n_broken


def test_every_page_is_in_the_table_of_contents_once():
    listed = pages.table_of_contents(text_of(DOCS / "index.md"))
    there = [page.stem for page in DOCS.glob("*.md") if page.stem != "index"]
    there += [f"notebooks/{path.stem}" for path in (DOCS / "notebooks").glob("*.ipynb")]
    assert sorted(listed) == sorted(there)


# --- code -------------------------------------------------------------------------------------------------------------


@every_page
def test_python_on_a_page_compiles(page):
    for block in pages.blocks(text_of(page), "python", "py"):
        compile(block, name_of(page), "exec")


def test_python_that_reads_one_latent_runs(monkeypatch, tmp_path, capsys):
    pytest.importorskip("open_clip")
    (block,) = (each for each in pages.blocks(text_of(DOCS / "reading.md"), "python") if "catalogue import" in each)
    (tmp_path / "defense").symlink_to(ROOT / "defense")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "reading.md", "exec"), {})
    most, columns, names, answer = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"latent \d+, \d+% of what was removed", most)
    assert {"frequency", "steerability"} <= set(ast.literal_eval(columns))
    assert ast.literal_eval(names) == ()
    assert [each["label"] for each in ast.literal_eval(answer)] == ["cat"]
    assert (tmp_path / "fires-most.png").stat().st_size > 0


@pytest.mark.parametrize("page", [README, DOCS / "start.md"], ids=name_of)
def test_python_of_the_first_pages_runs(page, monkeypatch, capsys):
    pytest.importorskip("open_clip")
    monkeypatch.chdir(ROOT)
    found = pages.blocks(text_of(page), "python")
    assert found
    names: dict[str, Any] = {}
    for block in found:
        exec(compile(block, name_of(page), "exec"), names)
    defended, plain = (ast.literal_eval(line) for line in capsys.readouterr().out.splitlines())
    assert (defended[0]["label"], plain[0]["label"]) == ("cat", "hammer")


@pytest.mark.parametrize("path", sorted((DOCS / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_compiles_and_is_kept_without_outputs(path):
    cells = json.loads(text_of(path))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 5
    for cell in code:
        compile("".join(cell["source"]), path.name, "exec")
        assert (cell["outputs"], cell["execution_count"]) == ([], None)
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    assert broken(path, text) == []


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def group() -> Any:
    from typer.main import get_command

    from defense.cli import app

    return get_command(app)


def wrong(group: Any, words: list[str], *, is_whole: bool) -> str | None:
    """What is wrong with `defense WORDS`; None where it is a command that would be run.

    Args:
        group: The command line.
        words: What follows `defense`.
        is_whole: Whether what must be given has to be there; in prose it may be left out.
    """
    if not words or words[0].startswith("-"):
        return None if words and words[0] in ("--version", "--help") else "no command"
    name, *rest = words
    if name not in group.commands:
        return f"there is no command {name}"
    command = group.commands[name]
    known = {option for each in command.params for option in (*each.opts, *each.secondary_opts)} | {"--help"}
    if unknown := [word for word in rest if re.match(r"--?[a-z]", word) and word.partition("=")[0] not in known]:
        return f"{name} has no option {unknown[0]}"
    if is_whole:
        try:
            command.make_context(name, rest)
        except Exception as error:  # of the library below typer, which has several
            return f"{name}: {error}"
    return None


@every_page
def test_commands_on_a_page_exist_and_take_what_they_are_given(page, group):
    for words in pages.commands(text_of(page)):
        if words[0] == "defense":
            assert wrong(group, words[1:], is_whole=True) is None, words
        elif words[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(words[2]) is not None, words
        elif words[:3] == ["pip", "install", "-e"]:
            extras = re.fullmatch(r"\.\[([\w,-]+)\]", words[3])
            assert extras is not None, words
            assert set(extras[1].split(",")) <= set(PYPROJECT["optional-dependencies"]), words


@every_page
def test_commands_and_options_in_the_prose_of_a_page_exist(page, group):
    if page.name in ("CHANGELOG.md", "RESULTS.md"):
        pytest.skip("says what was")
    sources = [path for folder in ("defense", "export", "benchmarks", "docs") for path in (ROOT / folder).rglob("*.py")]
    known = {option for path in sources for option in re.findall(r'"(--[\w-]+)"', text_of(path))} | OF_OTHERS
    given = [each for command in group.commands.values() for each in command.params]
    known |= {option for each in given for option in (*each.opts, *each.secondary_opts)}
    for code in pages.inline_code(text_of(page)):
        words = code.replace("...", "").split()
        if words[0] == "defense" and len(words) > 1 and not words[1].isupper():
            assert wrong(group, words[1:], is_whole=False) is None, code
        elif words[0] == "python" and words[1] == "-m":
            assert importlib.util.find_spec(words[2]) is not None, code
        options = [word.partition("=")[0] for word in words if re.match(r"--[a-z]", word)]
        assert set(options) <= known | {"--help", "--version", "--check"}, code


@pytest.mark.parametrize(
    ("line", "is_wrong"),
    [
        ("classify PICTURE --labels dog,cat --json", False),
        ("classify PICTURE --label dog,cat", True),
        ("clasify PICTURE", True),
        ("fit", True),
        ("fit OUT PICTURES --sae sae --steps many", True),
        ("--version", False),
    ],
)
def test_a_command_that_would_fail_is_found(group, line, is_wrong):
    assert (wrong(group, line.split(), is_whole=True) is not None) == is_wrong


def test_every_module_that_a_message_or_docstring_says_to_run_is_there():
    sources = [path for folder in ("defense", "export", "benchmarks", "demo") for path in (ROOT / folder).rglob("*.py")]
    named = {name for path in sources for name in re.findall(r"python -m (defense[.\w]*\w)", path.read_text("utf-8"))}
    assert len(named) > 10
    missing = [name for name in sorted(named) if importlib.util.find_spec(name) is None]
    assert missing == []


def test_commands_are_read_from_blocks_of_shell():
    shell = 'A=1 defense fit a \\\n  b && pytest  # not this\n# nor this\ncurl "x\ny" | defense info c\n'
    text = f"```sh\n{shell}```\n```text\nno\n```"
    assert list(pages.commands(text)) == [
        ["defense", "fit", "a", "b"],
        ["pytest"],
        ["curl", "xy"],
        ["defense", "info", "c"],
    ]


# --- tables, names, lengths -------------------------------------------------------------------------------------------


def test_tables_are_those_of_the_code():
    pytest.importorskip("torch")
    made = runpy.run_path(str(DOCS / "tables.py"))["pages"]()
    assert len(made) > 3
    for path, text in made.items():
        assert text_of(path) == text, "run: python docs/tables.py"


def test_the_reference_has_every_public_name():
    listed = re.findall(r"^\.\. auto\w+:: defense\.(\w+)$", text_of(DOCS / "api.md"), re.MULTILINE)
    assert sorted(listed) == sorted(defense.__all__)


def test_the_reference_of_the_command_line_has_every_command_and_option(group):
    found = runpy.run_path(str(DOCS / "tables.py"))["commands"]()
    for name, command in group.commands.items():
        section = found.partition(f"## defense {name}\n")[2].partition("\n## ")[0]
        section = section.lower()  # an argument may stand there by its name or, in capitals, as in the usage line
        assert all(each.opts[0].lower() in section for each in command.params if not each.hidden), name
    assert "<!-- commands -->" in text_of(DOCS / "cli.md")


def test_the_page_of_data_sets_says_of_each_where_it_lies():
    from defense.benchmarks.datasets import READERS

    page = text_of(DOCS / "measure.md").partition("On real data")[2]
    assert {reader.folder for reader in READERS.values()} - {None} == set(
        re.findall(r"\*\*On disk:\*\* `data/([\w-]+)/", page)
    )


def test_the_readme_can_be_read_at_a_sitting():
    assert len(text_of(README).splitlines()) <= 150


def test_a_page_begins_with_what_a_reader_can_do_after_it():
    own = [
        page for page in DOCS.glob("*.md") if "{include}" not in text_of(page) and page.stem not in ("index", "reading")
    ]
    assert len(own) > 10
    assert [page.name for page in own if not text_of(page).split("\n\n")[1].startswith("After this page")] == []
