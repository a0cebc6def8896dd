"""Print the lowest allowed version of every dependency, base and of some extras, as constraints for pip.

python .ci/lowest.py onnx parquet > lowest.txt
pip install -e ".[onnx,parquet]" -c lowest.txt
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path


def lowest(requirements: Iterable[str]) -> list[str]:
    """Return "name==version" for requirements such as "name[extra]>=version,<cap".

    Raises:
        ValueError: One states no lowest version.
    """
    pins = []
    for requirement in requirements:
        found = re.match(r"([\w.-]+)(?:\[[\w,.-]+\])?>=([\w.]+)", requirement)
        if found is None:
            raise ValueError(f"{requirement!r} states no lowest version; want name>=version")
        pins.append("==".join(found.groups()))
    return pins


def main(extras: list[str]) -> None:
    """Print the pins of this project, one a line."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    print(*lowest(project["dependencies"] + [each for extra in extras for each in optional[extra]]), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
