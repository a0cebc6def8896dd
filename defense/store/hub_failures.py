"""What the hub's client raises, in one sentence that says what to do."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from defense.errors import CheckpointError


class UnreachableError(CheckpointError):
    """The hub did not answer, or not now; what the cache has may do."""


@contextmanager
def failures(repo: str, revision: str | None, doing: str) -> Iterator[None]:
    """Turn whatever the client raises in this context into one sentence that says what to do."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    # Of the library that the client talks HTTP with, only the base of its errors counts, and that is theirs, too.
    kinds: tuple[type[Exception], ...] = (OSError, ValueError, *_exceptions(HfHubHTTPError.__bases__))
    try:
        yield
    except kinds as error:
        told = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
        reason, is_passing = _reason(told, repo, revision)
        kind = UnreachableError if is_passing else CheckpointError
        raise kind(f"{doing}: {reason}") from error


def _exceptions(bases: tuple[type, ...]) -> list[type[Exception]]:
    return [base for base in bases if issubclass(base, Exception)]


def _reason(error: BaseException, repo: str, revision: str | None) -> tuple[str, bool]:
    """Return why the hub did not give something and what to do, and whether that may pass by itself."""
    from huggingface_hub import errors

    where = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    status = getattr(getattr(error, "response", None), "status_code", None)
    login = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        return f"{repo} is gated; accept its conditions at {where}/{repo}, then {login}", False
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no revision {revision!r}; name a branch, a tag or a whole commit", False
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        return f"there is no repository {repo} that everybody may read; check its name, or {login}", False
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return f"{repo} has no such file", False
    if isinstance(error, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError):
        return "the client is offline (HF_HUB_OFFLINE is set, or nothing may be fetched); let it go online once", True
    if status == 403:
        return (
            f"{repo} may not be read or written with this token; ask for access, or {login} of another account",
            False,
        )
    if status == 429:
        return f"too many requests (429); wait some minutes, or {login}, which raises the limit", True
    if status is not None:
        return f"{where} answered with an error ({status}); try again later", True
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk is full; make room, or set HF_HOME to a folder on another disk", False
    first = str(error).partition("\n")[0] or type(error).__name__
    if isinstance(error, ValueError) or "onsistency check" in first:
        return f"{first}; run it again", False
    return f"{where} could not be reached or the connection broke ({first}); run it again when it is there", True
