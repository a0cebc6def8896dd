"""Generated blocks of a page: what stands between `<!-- begin NAME -->` and `<!-- end NAME -->`."""

from __future__ import annotations

from collections.abc import Mapping


def filled(text: str, blocks: Mapping[str, str]) -> str:
    """Return a page with its generated blocks put in anew.

    Args:
        text: The page.
        blocks: Name -> what stands between its markers.

    Raises:
        ValueError: The text lacks the markers of a block.
    """
    for name, block in blocks.items():
        begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
        head, found, rest = text.partition(begin)
        _, closed, tail = rest.partition(end)
        if not (found and closed):
            raise ValueError(f"the page has no {begin.strip()} ... {end}")
        text = head + begin + block + "\n" + end + tail
    return text
