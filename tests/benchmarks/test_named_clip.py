"""CLIPs by name."""

from __future__ import annotations

import pytest

pytest.importorskip("open_clip")

from defense.benchmarks.named_clip import load_named_clip
from defense.errors import ConfigError


def test_random_weights_cannot_be_drawn_for_an_unknown_model():
    with pytest.raises(ConfigError, match="knows no model 'ViT-Z'"):
        load_named_clip("ViT-Z", "random")
    with pytest.raises(ConfigError, match="from Hugging Face"):
        load_named_clip("roberta-ViT-B-32", "random")
