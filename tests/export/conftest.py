"""The torch-free runtime of the tiny bundle."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def clf(tiny_bundle):
    """A runtime for tests that leave it as it is."""
    from defense.export.runtime import OnnxClassifier

    return OnnxClassifier(tiny_bundle, batch_size=4)
