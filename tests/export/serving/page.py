"""The page docs/serve.md, whose code is run."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parents[3] / "docs"


def block(kind: str, holds: str) -> str:
    """The one block of code of a kind on the page that holds a text."""
    text = (DOCS / "serve.md").read_text(encoding="utf-8")
    (found,) = [code for code in re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL) if holds in code]
    return found
