"""The pages that people read: README and its like, and docs/; their links, headings and blocks of code."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = (
    README,
    *(ROOT / f"{name}.md" for name in ("CHANGELOG", "CONTRIBUTING", "SECURITY", "benchmarks/RESULTS", "demo/README")),
    *sorted(DOCS.glob("*.md")),
)


def name_of(page: Path) -> str:
    """A page's path in the checkout."""
    return page.relative_to(ROOT).as_posix()


def prose(text: str) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def links(text: str) -> list[str]:
    """Where the links and pictures of a page lead to."""
    text = prose(text)
    without_code = re.sub(r"`[^`\n]*`", "", text)
    return [*re.findall(r"\]\(([^)\s]+)\)", without_code), *re.findall(r'<img src="([^"]+)"', text)]


def anchors(text: str) -> set[str]:
    """What links may name of a page: its headings, spelled as GitHub and MyST do."""
    headings = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    spelled = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower().replace("`", "") for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in spelled}


def blocks(text: str, *kinds: str) -> list[str]:
    """The blocks of code of some kinds."""
    return [code for kind, code in re.findall(r"^```(\w+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE) if kind in kinds]


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a page's blocks of shell, in words."""
    for block in blocks(text, "sh"):
        for line in _lines(block.replace("\\\n", " ")):
            for part in re.split(r"\s(?:&&|\||;)\s", re.sub(r"(^|\s)#.*", "", line)):
                if words := [word for word in shlex.split(part) if not re.fullmatch(r"[A-Z_]+=\S*", word)]:
                    yield words


def _lines(block: str) -> Iterator[str]:
    """Lines of shell; what stands in quotes over several is one."""
    held = ""
    for line in block.splitlines():
        held += line
        if len(re.findall(r'(?<!\\)"', held)) % 2 == 0:
            yield held
            held = ""


def inline_code(text: str) -> list[str]:
    """What stands in backticks within a page's prose."""
    return re.findall(r"`([^`\n]+)`", prose(text))


def table_of_contents(text: str) -> list[str]:
    """The pages that a page's tables of contents name."""
    found = re.findall(r"^```\{toctree\}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in found for line in block.splitlines() if line and not line.startswith(":")]
    return [re.sub(r".*<(.*)>", r"\1", line) for line in lines]
