"""Write the tables of docs/ that are made from the code's own records: `python docs/tables.py`, or `--check`.

They stand between `<!-- begin NAME -->` and `<!-- end NAME -->`. `commands` is the reference of the command line, which
conf.py puts into its page.
"""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from defense.benchmarks.blocks import filled
from defense.store.folders import replacing

HERE = Path(__file__).resolve().parent


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, ["---"] * len(headings), *rows))


def first_line(thing: Any) -> str:
    """Return the first line of a docstring."""
    return (inspect.getdoc(thing) or "").splitlines()[0]


def hosts() -> str:
    """Return which models can be defended, from the families that look for a vision tower."""
    from defense.hosts import transformers_vision
    from defense.hosts.families import FAMILIES, TEXT_FAMILIES

    rows = []
    for family in FAMILIES:
        can_classify = "embeds and classifies" if family in TEXT_FAMILIES else "embeds; classifies inside open_clip"
        rows.append([first_line(family).rstrip("."), can_classify])
    whole = transformers_vision._WHOLE
    alone = transformers_vision._CLIP | transformers_vision._SIGLIP | transformers_vision._DINOV2
    names = table(
        ["class of `transformers`", "what it is"],
        [[f"`{name}`", "whole, or its tower with the projection"] for name in sorted(whole)]
        + [[f"`{name}`", "a tower alone, or inside a LLaVA-type model"] for name in sorted(alone - whole)],
    )
    return f"{table(['models', 'what they do'], rows)}\n\n{names}"


def formats() -> str:
    """Return which files of published SAEs are read, from the importers."""
    from defense.importers import FORMATS

    rows = []
    for name, module in FORMATS.items():
        found = import_module(f"defense.importers.{module}")
        source = re.search(r"Source: (github\.com/[\w./-]+?),", inspect.getdoc(found) or "")
        rows.append([f"`{name}`", first_line(found).rstrip("."), source[1] if source else "-"])
    return table(["`--format`", "what is read", "from"], rows)


def activations() -> str:
    """Return the rules, norms, edits and scopes that there are."""
    from typing import get_args

    from defense.core.config import Act, Norm
    from defense.core.latents import Edit, Scope

    rows = [
        ["activation rules of an SAE", ", ".join(f"`{each}`" for each in get_args(Act))],
        ["norms of its input", ", ".join(f"`{each}`" for each in get_args(Norm))],
        ["edits of a latent", ", ".join(f"`{each}`" for each in get_args(Edit))],
        ["tokens that are edited", ", ".join(f"`{each}`" for each in get_args(Scope))],
    ]
    return table(["what", "one of"], rows)


def data_sets() -> str:
    """Return what `defense bench` knows, from its readers and suites."""
    from defense.benchmarks.datasets import READERS, SUITES

    rows = []
    for name, reader in READERS.items():
        suites = [suite for suite, names in SUITES.items() if name in names and suite not in (name, "all")]
        rows.append([f"`{name}`", f"`{reader.folder}`" if reader.folder else "none; it is drawn", ", ".join(suites)])
    return table(["data set", "folder below `--data`", "part of the suites"], rows)


def extras() -> str:
    """Return the extras, with what they bring, from pyproject.toml."""
    import tomllib

    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    rows = []
    for name, brought in project["optional-dependencies"].items():
        others = [extra for each in brought for extra in re.findall(r"clip-defense\[(.*)\]", each)]
        packages = ", ".join(f"`{each}`" for each in brought if not each.startswith("clip-defense["))
        included = f"with `{others[0].replace(',', '` and `')}`; " if others else ""
        if name not in ("dev", "docs", "release", "server"):
            rows.append([f"`{name}`", included + packages])
    return table(["extra", "brings"], rows)


def errors() -> str:
    """Return the tree of exceptions."""
    from defense import errors as tree

    drawn = [line for line in (tree.__doc__ or "").splitlines() if re.match(r" +(DefenseError|├|│|└)", line)]
    return "```text\n" + inspect.cleandoc("\n".join(drawn)) + "\n```"


TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "supported.md": {"hosts": hosts, "formats": formats, "activations": activations},
    "measure.md": {"data-sets": data_sets},
    "start.md": {"extras": extras},
    "api.md": {"errors": errors},
}
"""Page -> its blocks."""


def pages() -> dict[Path, str]:
    """Return the pages that have such tables, as they have to be."""
    return {
        HERE / name: filled(
            (HERE / name).read_text(encoding="utf-8"), {block: made() for block, made in blocks.items()}
        )
        for name, blocks in TABLES.items()
    }


# --- the command line -------------------------------------------------------------------------------------------------


def commands() -> str:
    """Return the reference of the command line, a section for each command."""
    from typer.main import get_command

    from defense.cli import app

    group: Any = get_command(app)
    return "\n\n".join(_command(name, command) for name, command in group.commands.items())


def _command(name: str, command: Any) -> str:
    context = command.make_context(name, [], resilient_parsing=True)
    records = [each.get_help_record(context) for each in command.params]
    rows = [
        [f"`{_cell(names)}`", _cell(words).replace("*", "\\*").replace("<", "&lt;")]
        for names, words in filter(None, records)
    ]
    parts = [f"## defense {name}", inspect.cleandoc(command.help or "")]
    return "\n\n".join([*parts, table(["argument or option", "what it says"], rows)] if rows else parts)


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


def main() -> None:
    """Rewrite the pages in place, or say with --check whether they are up to date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where a table is stale")
    arguments = parser.parse_args()
    made = pages()
    stale = [path for path, text in made.items() if path.read_text(encoding="utf-8") != text]
    if arguments.check:
        raise SystemExit(int(bool(stale)))
    for path in stale:
        with replacing(path) as partial:
            partial.write_text(made[path], encoding="utf-8")


if __name__ == "__main__":
    main()
