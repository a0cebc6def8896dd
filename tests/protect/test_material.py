"""What `protect` makes of the pictures that it is given."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("open_clip")
from PIL import Image

from defense import protect as room
from defense.data.images import Limits
from defense.data.sources import Pictures, open_pictures
from defense.errors import ConfigError
from defense.hosts.clip import embedded_folder
from defense.store import cache
from defense.store.hub import Hub


def test_pictures_are_listed_once_and_keep_to_the_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed in range(4):
        pixels = np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{seed}.png")
    listed: list[Pictures] = []

    def listing(*arguments: Any, **options: Any) -> Pictures:
        listed.append(open_pictures(*arguments, **options))
        return listed[-1]

    for name, module in list(sys.modules.items()):
        if name.startswith("defense.") and getattr(module, "open_pictures", None) is open_pictures:
            monkeypatch.setattr(module, "open_pictures", listing)
    limits = Limits(max_pixels=10**6)
    request = room.Request(
        f"local-dir:{embedded_folder('clip')}", pictures=(folder,), measure_s=0.1, limits=limits, device="cpu"
    )
    with pytest.raises(ConfigError, match="--train"):  # after it looked at the pictures for an estimate
        room.protect(request, (), Hub())
    assert [each.limits for each in listed] == [limits]
