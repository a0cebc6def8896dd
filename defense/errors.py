"""Every exception that clip-defense raises on purpose.

    DefenseError
    ├── ConfigError (ValueError)             an argument or a combination of arguments that cannot work
    │   ├── ShapeError                       a width, rank or size that does not fit
    │   ├── HookPointError                   a block that is not there, or a scope that means nothing there
    │   └── GateError                        a fit that shows too little to become a defense
    ├── CheckpointError (RuntimeError)       an SAE file, artifact or bundle that cannot be used
    │   ├── IntegrityError                   its bytes are not the ones that were written
    │   └── NotThereError                    nothing is at the path, or under the name, that was given
    ├── InvalidImageError (ValueError)       one picture; `.code` says what is wrong with it
    ├── NonFiniteError (ValueError)          NaN or infinity in numbers that were handed over
    ├── CalibrationError (RuntimeError)      thresholds that answer otherwise than the rule they stand in for
    ├── BackendError (RuntimeError)          a device, kernel or runtime that was asked for and cannot run
    └── MissingDependencyError (ImportError) a package that is not installed; the message names the extra

Each is also the builtin in brackets, so plain `except ValueError` keeps working.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path


class DefenseError(Exception):
    """Base of all exceptions of this package."""


class ConfigError(DefenseError, ValueError):
    """An argument, or a combination of arguments, that cannot work."""


class ShapeError(ConfigError):
    """A width, rank or size that does not fit."""


class HookPointError(ConfigError):
    """A block that is not there, or a scope that means nothing there."""


class GateError(ConfigError):
    """A fit that shows too little to become a defense: an SAE of another CLIP, pictures that fool nobody, no gain."""


class CheckpointError(DefenseError, RuntimeError):
    """An SAE file, artifact or bundle that cannot be used."""


class IntegrityError(CheckpointError):
    """A file whose bytes are not the ones that were written.

    Attributes:
        file: Path of the file.
        want: sha256 that the manifest states.
        got: sha256 of the bytes on disk.
    """

    def __init__(self, file: str, want: str, got: str) -> None:
        super().__init__(
            f"{file}: sha256 is {got[:16]}..., the manifest says {want[:16]}...; the file was changed or "
            "damaged after it was written. Fetch or build it again."
        )
        self.file, self.want, self.got = file, want, got

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return type(self), (self.file, self.want, self.got)


class NotThereError(CheckpointError):
    """Nothing is at the path, or under the name, that was given, as after a slip of the pen."""


class InvalidImageError(DefenseError, ValueError):
    """A picture that cannot be read.

    Attributes:
        code: What is wrong with it, stable across releases: "empty", "not_an_image", "truncated", "corrupt",
            "too_large", "extreme_aspect", "unsupported_format", "unsupported_mode", "url_not_supported", "not_found",
            "bad_array".
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{message} ({code})")
        self.code, self.message = code, message

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.code, self.message)


class NonFiniteError(DefenseError, ValueError):
    """NaN or infinity in numbers that were handed over.

    Attributes:
        where: What held them, e.g. "input" or "W_dec".
    """

    def __init__(self, where: str) -> None:
        super().__init__(f"{where} holds NaN or infinity; every value must be finite")
        self.where = where

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return type(self), (self.where,)


class CalibrationError(DefenseError, RuntimeError):
    """Thresholds that answer otherwise than the TopK rule they stand in for.

    Attributes:
        agreement: Share of held-out pictures with the same prediction.
        least_agreement: What was asked for.
        n_held_out: How many pictures those were.
    """

    def __init__(self, agreement: float, least_agreement: float, n_held_out: int) -> None:
        super().__init__(
            f"thresholds give {agreement:.2%} of {n_held_out} held-out pictures the prediction of the exact rule; "
            f"{least_agreement:.2%} were asked for. Calibrate on more pictures of the kind it will see, export the "
            "exact rule (mode='exact'), or ask for less"
        )
        self.agreement, self.least_agreement, self.n_held_out = agreement, least_agreement, n_held_out

    def __reduce__(self) -> tuple[type, tuple[float, float, int]]:
        return type(self), (self.agreement, self.least_agreement, self.n_held_out)


class BackendError(DefenseError, RuntimeError):
    """A device, kernel or runtime that was asked for and cannot run."""


class MissingDependencyError(DefenseError, ImportError):
    """A package that is not installed.

    Attributes:
        extra: The extra of clip-defense that brings it.
    """

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; run: {install_command(extra)}")
        self.package, self.extra = package, extra

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.package, self.extra)


def install_command(extra: str) -> str:
    """Return what installs an extra into the environment that runs this.

    No package index has this package, so the command never names it: in a checkout it takes the sources, elsewhere the
    wheel, which the caller has to know the place of.

    Args:
        extra: A key of pyproject.toml's optional dependencies.
    """
    checkout = Path(__file__).resolve().parents[1]
    if (checkout / "pyproject.toml").is_file():
        return f'pip install -e "{checkout}[{extra}]"'
    return f'pip install "{wheel_name()}[{extra}]"'


def wheel_name() -> str:
    """Return the file name of this version's wheel."""
    try:
        own = version("clip-defense")
    except PackageNotFoundError:
        own = "0"  # a checkout that was never installed
    return f"clip_defense-{own}-py3-none-any.whl"


EXTRAS = {
    "gradio": "demo",
    "kserve": "kserve",
    "matplotlib": "bench",
    "onnx": "export",
    "onnxruntime": "onnx",
    "onnxscript": "export",
    "open_clip": "torch",
    "prometheus_client": "kserve",
    "pyarrow": "parquet",
    "ray": "ray",
    "scipy": "bench",
    "torch": "torch",
    "torchvision": "torch",
    "transformers": "transformers",
}
"""Package -> the extra that brings it."""


def cannot_import(package: str, error: Exception) -> DefenseError:
    """Return the error for a package that an import failed for: it is not installed, or it is and is broken.

    Args:
        package: What was imported; its extra brings what it needs, too.
        error: What the import raised.
    """
    missing = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if missing and not _is_there(missing):
        return MissingDependencyError(missing, EXTRAS.get(package, EXTRAS.get(missing, "torch")))
    return BackendError(
        f"{package} is installed but cannot be imported: {error}. Install it again, with what belongs to it; `defense "
        "doctor` says what does not"
    )


def _is_there(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):
        return True
