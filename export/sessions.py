"""ONNX Runtime sessions that do what was asked for: the providers named, as many threads as there are cores to use.

ONNX Runtime itself falls back to the CPU without a word, counts the cores of the machine and not those of the
container, and loads CUDA's libraries only when told to.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from defense.data.listing import as_text
from defense.data.threads import usable_cores
from defense.errors import BackendError, CheckpointError, ConfigError, cannot_import, install_command

log = logging.getLogger(__name__)

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
HALF_OPTIONS = {"graph_optimization_level": 2}
"""For half precision: the CPU's own optimizations, which are beyond level 2, can end the process on such a graph."""


def import_onnxruntime() -> Any:
    """Return the module.

    Raises:
        MissingDependencyError: It is not installed.
        BackendError: Both of its wheels are, which overwrite each other.
    """
    if len(installed_wheels()) > 1:
        raise BackendError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other; run: pip uninstall -y "
            f"onnxruntime onnxruntime-gpu, then: {install_command('onnx')}, or the same with onnx-gpu"
        )
    try:
        import onnxruntime
    except ImportError as error:
        raise cannot_import("onnxruntime", error) from error
    return onnxruntime


def installed_wheels() -> list[str]:
    """Return which of the two wheels that bring the module onnxruntime are installed."""
    found = []
    for wheel in ("onnxruntime", "onnxruntime-gpu"):
        try:
            version(wheel)
        except PackageNotFoundError:
            continue
        found.append(wheel)
    return found


def make_options(fields: Mapping[str, Any]) -> Any:
    """Return SessionOptions: as many threads as this process may use cores, then what `fields` sets.

    Args:
        fields: Attribute of `onnxruntime.SessionOptions` -> value.

    Raises:
        ConfigError: There is no such attribute, or it does not take the value.
    """
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = usable_cores()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # below are remarks on the graph, which was verified when it was made
    for name, value in fields.items():
        if name.startswith("_") or not hasattr(options, name):
            raise ConfigError(f"onnxruntime.SessionOptions has no attribute {name!r}")
        if name == "graph_optimization_level":
            value = ort.GraphOptimizationLevel(value)
        try:
            setattr(options, name, value)
        except (TypeError, AttributeError) as error:
            raise ConfigError(f"session_options: {name}={value!r}: {error}") from error
    return options


def check_path(path: Path) -> None:
    """Refuse a path that ONNX and ONNX Runtime cannot be given: they take text, and this one is none.

    Raises:
        ConfigError: Some of its bytes are not UTF-8.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{as_text(path)} holds bytes that are not UTF-8, and ONNX Runtime takes no such path; rename what has them"
        ) from error


def open_session(path: Path, providers: Sequence[str] | None, fields: Mapping[str, Any]) -> Any:
    """Return an `onnxruntime.InferenceSession` that runs on the providers asked for.

    Args:
        path: The graph.
        providers: Execution providers, best first; None takes CUDA where it works, and else the CPU, and logs which.
        fields: See `make_options`.

    Raises:
        BackendError: A provider is not there or does not start.
        CheckpointError: ONNX Runtime refuses the graph.
        ConfigError: See `check_path`.
    """
    check_path(path)
    ort = import_onnxruntime()
    if hasattr(ort, "preload_dlls") and "onnxruntime-gpu" in installed_wheels():
        ort.preload_dlls()
    available = ort.get_available_providers()
    wanted = list(providers) if providers is not None else [name for name in (CUDA, CPU) if name in available]
    if missing := [name for name in wanted if name not in available]:
        advice = f", or in place of the extra onnx: {install_command('onnx-gpu')}" if CUDA in missing else ""
        raise BackendError(
            f"onnxruntime {ort.__version__} has no {', '.join(missing)}; it has {', '.join(available)}. Ask for one of "
            f"these{advice}"
        )
    try:
        session = ort.InferenceSession(path, make_options(fields), providers=wanted)
    except ConfigError:
        raise
    except Exception as error:  # onnxruntime's own exceptions share no base class
        raise CheckpointError(f"{path}: onnxruntime {ort.__version__} refuses this graph: {error}") from error
    running = session.get_providers()
    if failed := [name for name in wanted if name not in running]:
        if providers is not None:
            raise BackendError(
                f"{', '.join(failed)} was asked for and does not start on this machine; the log of onnxruntime says "
                f"why. It would run on {running[0]}: ask for that to use it"
            )
        log.warning("%s is there but does not start", ", ".join(failed))
    log.info("%s runs on %s", path.name, running[0])
    return session
