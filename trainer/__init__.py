"""One training run, in one or many processes: `python -m trainer`."""

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""Folder of this project's packages."""


def prefer_own_packages() -> None:
    """Put the working directory last on Python's path, so that a folder of the user hides none of our packages.

    Raises:
        SystemExit: A folder of PYTHONPATH hides one of them, or the working directory was removed; code 2, after one
            line on standard error.
    """
    try:
        here = os.getcwd()
    except FileNotFoundError:
        print("error: the working directory was removed; change to another one", file=sys.stderr)
        sys.exit(2)
    if sys.argv[:1] == ["-m"] and not sys.flags.safe_path:
        del sys.path[0]
    sys.path.extend(path for path in (str(ROOT), here) if path not in sys.path)
    for name in ("conf", "ema", "launch", "models", "trainer"):
        spec = importlib.util.find_spec(name)
        places = [] if spec is None else [spec.origin or "", *(spec.submodule_search_locations or [])]
        if not any(Path(place).resolve().is_relative_to(ROOT / name) for place in places):
            hider = next(filter(None, places), "nothing")
            print(
                f"error: PYTHONPATH: {hider} hides {ROOT / name}; rename it or leave it out", file=sys.stderr
            )
            sys.exit(2)


def begin_program() -> None:
    """Prepare this process for a command of ours: `prefer_own_packages`, and output that a lost terminal cannot end."""
    prefer_own_packages()
    from trainer.shell.terminal import outlive_terminal

    outlive_terminal()


if sys.argv[:1] == ["-m"]:  # while Python looks for the module to run as a program
    begin_program()
