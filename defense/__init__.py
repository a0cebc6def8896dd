"""Zero-shot image classification with CLIP that does not read the note on the apple.

    from defense import RobustClassifier
    clf = RobustClassifier.from_pretrained("embedded")
    clf("picture.jpg", candidate_labels=["apple", "pizza"])

Names are resolved on first use: `import defense` loads neither torch nor any other backend.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .classify.classifier import RobustClassifier as RobustClassifier
    from .classify.explanation import Explanation as Explanation
    from .core.config import SAEConfig as SAEConfig
    from .core.latents import LatentSet as LatentSet
    from .core.sae import SparseAutoencoder as SparseAutoencoder
    from .core.suppress import Suppressor as Suppressor
    from .errors import BackendError as BackendError
    from .errors import CalibrationError as CalibrationError
    from .errors import CheckpointError as CheckpointError
    from .errors import ConfigError as ConfigError
    from .errors import DefenseError as DefenseError
    from .errors import GateError as GateError
    from .errors import HookPointError as HookPointError
    from .errors import IntegrityError as IntegrityError
    from .errors import InvalidImageError as InvalidImageError
    from .errors import MissingDependencyError as MissingDependencyError
    from .errors import NonFiniteError as NonFiniteError
    from .errors import NotThereError as NotThereError
    from .errors import ShapeError as ShapeError
    from .hosts.attach import detach as detach
    from .hosts.attach import wrap as wrap
    from .hosts.clip import Clip as Clip
    from .hosts.controls import Controls as Controls
    from .hosts.defense import Defense as Defense

# ONNX Runtime 1.29 and newer sends telemetry and leaves files in HOME and TMPDIR unless this is set at its import.
# Whatever imports it for us comes after this line, and processes that we start inherit it. 0 allows telemetry.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_HOMES = {
    "classify.classifier": ("RobustClassifier",),
    "classify.explanation": ("Explanation",),
    "core.config": ("SAEConfig",),
    "core.latents": ("LatentSet",),
    "core.sae": ("SparseAutoencoder",),
    "core.suppress": ("Suppressor",),
    "errors": (
        "BackendError",
        "CalibrationError",
        "CheckpointError",
        "ConfigError",
        "DefenseError",
        "GateError",
        "HookPointError",
        "IntegrityError",
        "InvalidImageError",
        "MissingDependencyError",
        "NonFiniteError",
        "NotThereError",
        "ShapeError",
    ),
    "hosts.attach": ("detach", "wrap"),
    "hosts.clip": ("Clip",),
    "hosts.controls": ("Controls",),
    "hosts.defense": ("Defense",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "BackendError",
    "CalibrationError",
    "CheckpointError",
    "Clip",
    "ConfigError",
    "Controls",
    "Defense",
    "DefenseError",
    "Explanation",
    "GateError",
    "HookPointError",
    "IntegrityError",
    "InvalidImageError",
    "LatentSet",
    "MissingDependencyError",
    "NonFiniteError",
    "NotThereError",
    "RobustClassifier",
    "SAEConfig",
    "ShapeError",
    "SparseAutoencoder",
    "Suppressor",
    "detach",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
    except (ImportError, OSError) as error:
        from .errors import cannot_import

        raise cannot_import("torch", error) from error


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
