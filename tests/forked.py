"""Commands of this project, started by `subprocess`, begin in a fork of a process that has imported their packages.

Importing torch and the other packages takes most of the time of a small command. Here a server imports them once for
each test process, and forks for each command. The fork is a process of its own, with the parent, process group,
session, streams, descriptors, environment and signals that a new interpreter would have. A command that starts others
(a sweep its runs, torchrun its workers) gets a server of its own before it begins. `tests.fork_server` is that server.

Not taken over are umask, limits of resources, and variables that are read while the interpreter starts or a package is
imported, such as PYTHONHASHSEED. All forks have one hash seed, packages of this tree are imported already, no file is
synced (`skip_syncs`), and what the interpreter does at its end, after `atexit`, is left out. So a test of what only a
new interpreter shows starts the command by another program, such as `sh`. Other programs are started as always, and so
are scripts and `python -c` without `FURTHER_IMPORTS`.
"""

import ctypes
import fcntl
import os
import pickle
import signal
import socket
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
TORCHRUN = "torch.distributed.run"
"""Module of the program `torchrun`."""
WITHOUT_PICTURES = "TESTS_WITHOUT_PICTURES"
"""Environment variable; if it is set, the report of a run has no pictures."""
FURTHER_IMPORTS = "TESTS_FURTHER_IMPORTS"
"""Environment variable of modules that are imported before the fork, once for all forks.

With it scripts and `python -c` fork too. A fork does not hand it on.
"""

_SPACE_BYTES = 1 << 16
"""Size of a variable that makes room for those of a command (`_show_environment`)."""
_TIMEOUT_S = 60.0
_PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None)


@dataclass(frozen=True)
class Request:
    """A command to carry out, and what a new process takes over from the one that starts it."""

    words: list[str]
    folder: str
    variables: dict[bytes, bytes]
    descriptors: list[int]
    """Numbers that the passed descriptors get: 0, 1, 2 and those of `pass_fds`."""
    session: bool
    """Whether the process begins a session."""
    terminal: bool
    """Whether descriptor 0 becomes the terminal of this session."""
    group: int
    """Its process group otherwise."""
    ignored: list[int]
    blocked: list[int]


class Server:
    """The caller's end of the connection to a server."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._turn = threading.Lock()
        self._is_ready = False

    def start(self, request: Request, descriptors: Sequence[int]) -> int:
        """Let the server fork; return the id of the new process, which is a child of this process.

        Raises:
            OSError: The server has ended or does not answer, or the fork failed and printed why.
        """
        with self._turn:
            if not self._is_ready:  # it is still importing
                self._is_ready = self._connection.recv(64) == b"ready"
            # An interrupted call would leave its answer to the next one.
            mask = signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
            # The process that forks the command exits at once. The kernel then gives the command to the nearest
            # ancestor with this flag.
            _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            try:
                self._connection.settimeout(_TIMEOUT_S)
                socket.send_fds(self._connection, [pickle.dumps(request)], list(descriptors))
                answer = self._connection.recv(64)
            finally:
                _libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if not answer:
            raise OSError(f"{request.words}: could not be forked; the error is above")
        return int(answer)


@cache
def install() -> None:
    """Start the commands of this process by forks, of a server that begins with the first of them; on Linux."""
    if sys.platform != "linux":
        return
    found: list[tuple[Server, subprocess.Popen[bytes]]] = []
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TESTS_SPACE": " " * _SPACE_BYTES}

    def server() -> Server:
        if not found:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            code = f"from tests.fork_server import main; main({theirs.fileno()})"
            process = subprocess.Popen(
                [sys.executable, "-c", code],
                env=environment,
                cwd=REPOSITORY,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
            theirs.close()
            found.append((Server(ours), process))
        return found[0][0]

    start_by(server)


def start_by(server: Callable[[], Server]) -> None:
    """Let `subprocess` ask a server for each command of this project."""
    execute = subprocess._fork_exec  # type: ignore[attr-defined]

    def fork(*given: Any) -> int:
        request = _request(given)
        if request is None:
            pid: int = execute(*given)
            return pid
        in_, out, err = given[6], given[9], given[11]
        streams = [own if passed == -1 else passed for own, passed in enumerate((in_, out, err))]
        return server().start(request, [*streams, *request.descriptors[3:]])

    subprocess._fork_exec = fork  # type: ignore[attr-defined]


def skip_syncs() -> None:
    """Let `os.fsync` return at once in this process: a sync takes milliseconds, and no test takes the power away."""

    def skip(file: object) -> None: ...

    os.fsync = skip  # type: ignore[assignment]


def take_terminal() -> None:
    """Make standard input the terminal of this process's session; the `preexec_fn` that a fork can take over."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _request(given: tuple[Any, ...]) -> Request | None:
    """Return what to ask of the server for a call of `_posixsubprocess.fork_exec`; None for another program."""
    # Further ones: 13 is the pipe for errors of exec, 14 restore_signals, 15 start_new_session.
    words, _, close, kept, folder, environment = given[:6]
    words = [os.fsdecode(word) for word in words]
    folder = os.path.abspath(os.fsdecode(folder or os.getcwd()))
    # process_group, gid, groups, uid, umask and preexec_fn
    is_plain = given[14] and given[16:21] == (-1, None, None, None, -1)
    is_plain = is_plain and given[21] in (None, take_terminal)
    variables = dict(
        entry.split(b"=", 1) for entry in (_own_variables() if environment is None else environment)
    )
    can_fork = _is_command(words) or (is_script(words) and FURTHER_IMPORTS.encode() in variables)
    if not (can_fork and close and is_plain and os.path.isdir(folder)):
        return None
    return Request(
        words=words,
        folder=folder,
        variables=variables,
        descriptors=[0, 1, 2, *(number for number in kept if number != given[13] and number > 2)],
        session=bool(given[15]),
        terminal=given[21] is not None,
        group=os.getpgrp(),
        ignored=[
            n for n in signal.valid_signals() if signal.getsignal(n) == signal.SIG_IGN and n != signal.SIGPIPE
        ],
        blocked=sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
    )


def _own_variables() -> list[bytes]:
    return [key + b"=" + value for key, value in os.environb.items()]


def is_script(words: Sequence[str]) -> bool:
    """Return whether a command line runs a file of Python, or `python -c`."""
    return words[0] == sys.executable and words[1:] != [] and (words[1] == "-c" or words[1].endswith(".py"))


def _is_command(words: Sequence[str]) -> bool:
    if words[0] in ("polyak", "torchrun"):
        return True
    if words[0] != sys.executable:
        return False
    module = module_of(words)[0]
    return module == TORCHRUN or module.split(".")[0] in ("trainer", "launch")


def module_of(words: Sequence[str]) -> tuple[str, list[str]]:
    """Return the module that a command line runs, and its arguments; an empty name if it runs no module."""
    rest = list(words[1:])
    while rest and rest[0] == "-u":
        del rest[0]
    return (rest[1], rest[2:]) if len(rest) > 1 and rest[0] == "-m" else ("", rest)
