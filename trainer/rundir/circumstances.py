"""The circumstances of a run that its directory records: time, host, command line, versions and commit."""

import datetime
import os
import platform
import socket
import subprocess
import sys
from typing import Any

_GIT_TIMEOUT_S = 10


def circumstances() -> dict[str, Any]:
    """Return the start time in UTC, the host, the command line and the versions, for `meta.json`."""
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "argv": list(sys.argv),
        "versions": versions(),
    }


def versions() -> dict[str, str | None]:
    """Return the versions of Python, torch and polyak; None for a package that is not installed."""
    return {
        "python": platform.python_version(),
        "torch": _version("torch"),
        "polyak": _version("polyak"),
    }


def _version(distribution: str) -> str | None:
    from importlib import metadata  # most commands make no run directory, and need not wait for this import

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def git_state() -> dict[str, Any] | None:
    """Return the commit of the working tree and whether tracked files differ from it; None outside git."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments],
            check=True,
            capture_output=True,
            text=True,
            timeout=_GIT_TIMEOUT_S,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        ).stdout.strip()

    try:
        return {
            "commit": git("rev-parse", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return None
