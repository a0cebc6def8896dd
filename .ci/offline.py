"""Say what a built site would load from other hosts, and exit with 1 where there is anything.

python .ci/offline.py build/site

Links that a reader may follow are no loads.
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

_ELSEWHERE = re.compile(r"\s*(?:https?:)?//", re.IGNORECASE)
_IN_STYLES = re.compile(r"(?:url\(|@import)\s*[\"']?\s*((?:https?:)?//[^\"')\s]+)", re.IGNORECASE)
_LOADS = {"rel": {"stylesheet", "preload", "modulepreload", "preconnect", "dns-prefetch", "icon", "shortcut"}}


class _Loads(HTMLParser):
    """Collects the addresses elsewhere that a page makes a browser ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        loaded = [values.get(name, "") for name in ("src", "srcset", "poster", "data", "background")]
        if tag == "link" and set(values.get("rel", "").lower().split()) & _LOADS["rel"]:
            loaded.append(values.get("href", ""))
        self.found += [value for value in loaded if _ELSEWHERE.match(value)]
        self.found += _IN_STYLES.findall(values.get("style", ""))

    def handle_data(self, data: str) -> None:
        if self.lasttag == "style":
            self.found += _IN_STYLES.findall(data)


def loads(site: Path) -> dict[str, list[str]]:
    """Return, for each page and stylesheet of a site that has any, the addresses elsewhere that it loads."""
    found: dict[str, list[str]] = {}
    for path in sorted(site.rglob("*")):
        if path.suffix == ".html":
            parser = _Loads()
            parser.feed(path.read_text(encoding="utf-8"))
            found[str(path.relative_to(site))] = parser.found
        elif path.suffix == ".css":
            found[str(path.relative_to(site))] = _IN_STYLES.findall(path.read_text(encoding="utf-8"))
    if not found:
        raise SystemExit(f"{site} holds no site")
    return {name: addresses for name, addresses in found.items() if addresses}


def main(site: str) -> None:
    """Print what would be loaded."""
    found = loads(Path(site))
    for name, addresses in found.items():
        print(f"{name} loads {', '.join(sorted(set(addresses)))}")
    raise SystemExit(int(bool(found)))


if __name__ == "__main__":
    main(sys.argv[1])
