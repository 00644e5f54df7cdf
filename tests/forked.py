"""Commands of this project in processes of their own that are forked from one which has imported torch.

A command takes two seconds to import torch and the other packages, which is most of what a small one takes. Here a
server process imports them once, and each command begins in a fork of it. Packages of this project are not imported
before the fork, so where a command finds them is as it is for a user.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.ranks import IMPORTED

TORCHRUN = "torch.distributed.run"
"""Module of the program `torchrun`."""


def can_fork(words: Sequence[str]) -> bool:
    """Return whether a command line is one of Python that a fork can carry out."""
    return words[0] in ("polyak", "torchrun") or (words[0] == sys.executable and words[1] == "-m")


def run_forked(
    words: Sequence[str], folder: Path, variables: Mapping[str, str], timeout_s: float
) -> subprocess.CompletedProcess[str]:
    """Carry out a command line in a folder and with these environment variables, and return what it printed.

    Raises:
        subprocess.TimeoutExpired: It took longer; it was killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    with tempfile.TemporaryDirectory() as scratch:
        files = [os.path.join(scratch, name) for name in ("out", "err")]
        process = context.Process(target=_carry_out, args=(list(words), str(folder), dict(variables), *files))
        process.start()
        try:
            process.join(timeout_s)
            if process.exitcode is None:
                raise subprocess.TimeoutExpired(words, timeout_s)
        finally:
            process.kill()
            process.join()
        out, err = (Path(file).read_text(encoding="utf-8", errors="replace") for file in files)
    return subprocess.CompletedProcess(list(words), process.exitcode, out, err)


def _carry_out(words: list[str], folder: str, variables: dict[str, str], out: str, err: str) -> None:
    """Become the command, in the forked process; its exit code is that of this process."""
    for number, file in ((1, out), (2, err)):
        written = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(written, number)
        os.close(written)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    import torch

    torch.set_num_threads(int(variables.get("OMP_NUM_THREADS", "1")))
    paths = variables.get("PYTHONPATH", "").split(os.pathsep)
    installed = [path for path in sys.path if path.startswith(sys.base_prefix) or "site-packages" in path]
    if words[0] == "polyak":
        sys.path[:] = [str(Path(sys.executable).parent), *paths, *installed]
        sys.argv = words
        from launch.console import main

        sys.exit(main())
    module, rest = (TORCHRUN, words[1:]) if words[0] == "torchrun" else (words[2], words[3:])
    sys.path[:] = [folder, *paths, *installed]
    sys.argv = ["-m", *rest]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
