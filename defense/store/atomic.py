"""Folders and files that are written whole or not at all, whoever else writes them, and whenever a process is killed.

What is being written lies in a workshop, a hidden folder beside its final place, and its writer holds a lock on that.
So the next one at the same target can tell what a killed process left, which nobody holds, from what another one is
writing, and removes it. Where locks are not to be had (Windows, some network file systems) nothing is taken for left
behind.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors

from defense.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_NEW, _OLD, _PARTIAL = "new", "old", ".partial"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


@contextmanager
def publishing(target: Path, *, read: Callable[[Path], object]) -> Iterator[Path]:
    """Yield an empty folder to fill; when the context ends it is read back and takes the place of `target`.

    It lies beside `target`, so that giving it its name is one rename. Where the body or `read` raises, what was at
    `target` stays, and nothing else is left. Where the process is killed, the next one that reads or writes `target`
    restores and cleans it. Several processes may publish one folder at the same time: the last one stays.

    Args:
        target: The folder's final place; what is there is replaced as a whole. Its parent must exist.
        read: Reads the filled folder; raises where it is not what it should be.

    Raises:
        OSError: There is no space left, or the file system takes no more for another reason.
    """
    restore(target)
    workshop, lock = _workshop(target)
    staging, retired = workshop / _NEW, workshop / _OLD
    try:
        with _naming(target):
            staging.mkdir()  # not `workshop` itself: only its owner may read that
            yield staging
            read(staging)
            with exclusive(target.parent):
                try:
                    if target.exists():
                        target.rename(retired)
                    staging.rename(target)
                except BaseException:
                    if retired.exists() and not target.exists():
                        retired.rename(target)
                    raise
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
        _let_go(lock)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a file to write, empty; when the context ends it takes the place of `path`.

    Where the body raises, what was at `path` stays, and nothing else is left; what a killed process left is removed by
    the next one that replaces the same file. Who may read the file follows the umask, whatever the writer did. Of a
    link, the file that it leads to is replaced. Several processes may replace one file at the same time: the last one
    stays.

    Args:
        path: The file's final place; its folder must exist. The name that is written under ends in ".partial", so a
            writer that goes by the suffix has to be told its format, or given an open file.

    Raises:
        OSError: There is no space left, or the file system takes no more for another reason.
        ConfigError: See `led_to`.
    """
    target = led_to(path)
    restore(target)
    workshop, lock = _workshop(target)
    partial = workshop / f"{target.name}{_PARTIAL}"
    try:
        with _naming(target):
            partial.touch(exist_ok=False)
            mode = partial.stat().st_mode
            yield partial
            partial.chmod(mode)  # safetensors gives only its owner leave to read
            partial.replace(target)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
        _let_go(lock)


def led_to(path: str | os.PathLike[str]) -> Path:
    """Return the absolute path of what a path leads to, through links: what is written takes that place.

    Raises:
        ConfigError: Links lead back to each other.
    """
    target = Path(os.path.realpath(path))  # `Path.resolve` raises what is no OSError, and that on some versions only
    if target.is_symlink():
        raise ConfigError(f"{os.fspath(path)} is a link that leads back to itself; choose another path, or remove it")
    return target


def check_writable(folder: Path) -> None:
    """Make a file in a folder and remove it, so that one that takes none is found before the work and not after it.

    Raises:
        OSError: Nothing can be written there: no permission, a file system that is read-only, or none of files.
    """
    try:
        with tempfile.TemporaryFile(dir=folder):
            return
    except OSError as error:
        why = f"nothing can be written into this folder ({error.strerror}); choose another"
        raise OSError(error.errno, why, str(folder)) from error


def restore(target: Path) -> bool:
    """Put a folder back that a process was killed while replacing, and remove what killed processes left beside it.

    Returns:
        Whether there is something at `target`; a moment at which another process replaces it does not count.
    """
    if not _workshops(target):
        return target.exists()
    with exclusive(target.parent):
        for workshop in _workshops(target):
            if (lock := _held(workshop)) is None:
                continue
            with suppress(OSError):  # where this may not be written, it is left as it is
                if (workshop / _OLD).exists() and not target.exists():
                    (workshop / _OLD).rename(target)
                shutil.rmtree(workshop)
            _let_go(lock)
        return target.exists()


def write_tensors(
    tensors: Mapping[str, Any],
    path: Path,
    save_file: Callable[..., None],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file.

    Args:
        tensors: By name.
        path: Where to.
        save_file: Of `safetensors.numpy` or of `safetensors.torch`, as the tensors are.
        metadata: What else the file says.

    Raises:
        OSError: It cannot be written: no space is left, say. (safetensors raises an error of its own kind, which says
            the operating system's number in its text only.)
    """
    try:
        save_file(dict(tensors), path, *([] if metadata is None else [dict(metadata)]))
    except safetensors.SafetensorError as error:
        code = re.search(r"(?:os error |code: )(\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


@contextmanager
def exclusive(folder: Path, *, is_shared: bool = False) -> Iterator[None]:
    """Hold a lock on a folder, against other processes and threads that use this, for as long as the context lasts.

    Args:
        folder: The folder.
        is_shared: Let others that hold it shared in too.
    """
    handle = _open(folder)
    try:
        if handle is not None and fcntl is not None:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(handle, fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX)
        yield
    finally:
        _let_go(handle)


@contextmanager
def _naming(target: Path) -> Iterator[None]:
    """Say of a file system that takes no more what could not be written, and what is there now."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        why = f"{os.strerror(error.errno)}; what was there before is unchanged. Make room, or write elsewhere"
        raise OSError(error.errno, why, str(target)) from error


def _workshop(target: Path) -> tuple[Path, int | None]:
    """Return a new folder beside `target`, and the lock on it."""
    with exclusive(target.parent), _naming(target):  # nobody takes it for abandoned before it is locked
        workshop = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        return workshop, _held(workshop)


def _workshops(target: Path) -> list[Path]:
    """Return the folders beside `target` whose names and contents are those of its workshops."""
    pattern = re.compile(re.escape(f".{target.name}-") + "[a-z0-9_]{8}")
    try:
        named = [path for path in target.parent.iterdir() if pattern.fullmatch(path.name) and not path.is_symlink()]
        return [path for path in named if path.is_dir() and all(_is_ours(each.name, target) for each in path.iterdir())]
    except OSError:
        return []  # there is no such place, or it cannot be read: whoever uses it will say so


def _is_ours(name: str, target: Path) -> bool:
    """Return whether something in a folder is what a workshop holds; safetensors writes under ".tmp..." first."""
    return name in (_NEW, _OLD, f"{target.name}{_PARTIAL}") or name.startswith(".tmp")


def _held(path: Path) -> int | None:
    """Return a lock on a file or folder; None where another holds it, or there are no locks."""
    handle = _open(path)
    if handle is None or fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _open(path: Path) -> int | None:
    if fcntl is None:
        return None
    try:
        return os.open(path, os.O_RDONLY)
    except OSError:
        return None


def _let_go(handle: int | None) -> None:
    if handle is not None:
        os.close(handle)
