"""The command line in this process."""

from __future__ import annotations

from typer.testing import CliRunner

from defense.cli import app


def run(*arguments: object) -> tuple[int, str, str]:
    """Return the exit code, stdout and stderr of `defense ARGUMENTS`; what escapes it is raised here."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr
