"""Commands of this project, started by `subprocess`, begin in a fork of a process that has imported their packages.

Importing torch and the other packages takes most of the time of a small command. Here a server imports them once for
each test process, and forks for each command. The fork is a process of its own, with the parent, process group,
session, streams, descriptors, environment and signals that a new interpreter would have. A command that starts others
(a sweep its runs, torchrun its workers) gets a server of its own before it begins.

Not taken over are umask, limits of resources, and variables that are read while the interpreter starts or a package is
imported, such as PYTHONHASHSEED. All forks have one hash seed, packages of this tree are imported already, and what
the interpreter does at its end, after `atexit`, is left out. So a test of what only a new interpreter shows starts the
command by another program, such as `sh`. Other programs are started as always, and so are scripts and `python -c`
without `FURTHER_IMPORTS`.
"""

import atexit
import ctypes
import fcntl
import gc
import importlib
import io
import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from hydra.core.hydra_config import HydraConfig

from trainer.config.compose import compose
from trainer.shell.commands import MODULES

REPOSITORY = Path(__file__).parents[1]
TORCHRUN = "torch.distributed.run"
"""Module of the program `torchrun`."""
RENDEZVOUS = "torch.distributed.elastic.rendezvous.dynamic_rendezvous"
OURS = ("conf", "ema", "models", "trainer", "launch")
WITHOUT_PICTURES = "TESTS_WITHOUT_PICTURES"
"""Environment variable; if it is set, the report of a run has no pictures."""
FURTHER_IMPORTS = "TESTS_FURTHER_IMPORTS"
"""Environment variable of modules that are imported before the fork, once for all forks.

With it scripts and `python -c` fork too.
"""

IMPORTED = (
    *("torch.distributed.fsdp", "torch.distributed.checkpoint", "torch._dynamo", "torch._inductor"),
    *("hydra", "jinja2", "matplotlib.backends.backend_agg", "matplotlib.figure", "PIL.Image", "rich.table"),
)
"""Packages that the server imports: the slow ones of what nearly every command needs. They start no thread."""
FURTHER_PARTS = (
    *("rich.console", "torch.distributed.tensor.debug", "models.gpt"),
    *("trainer.run", "trainer.report.page", "trainer.data.python_docs", "trainer.tasks.language_modeling"),
    *("launch.certifying.certificate", "launch.evaluating.checkpoint", "launch.exporting.weights"),
    *("launch.sweeps.backends.printed", "launch.synthesizing.evaluating"),
)
"""Modules that commands import later than at their start."""

_MAX_REQUEST_BYTES = 1 << 20
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
            code = f"from tests.forked import main; main({theirs.fileno()})"
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

    _start_by(server)


def _start_by(server: Any) -> None:
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
    can_fork = _is_command(words) or (_is_script(words) and FURTHER_IMPORTS.encode() in variables)
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


def _is_script(words: Sequence[str]) -> bool:
    return words[0] == sys.executable and words[1:] != [] and (words[1] == "-c" or words[1].endswith(".py"))


def _is_command(words: Sequence[str]) -> bool:
    if words[0] in ("polyak", "torchrun"):
        return True
    if words[0] != sys.executable:
        return False
    module = _module(words)[0]
    return module == TORCHRUN or module.split(".")[0] in ("trainer", "launch")


def _module(words: Sequence[str]) -> tuple[str, list[str]]:
    """Return the module that a command line runs, and its arguments; an empty name if it runs no module."""
    rest = list(words[1:])
    while rest and rest[0] == "-u":
        del rest[0]
    return (rest[1], rest[2:]) if len(rest) > 1 and rest[0] == "-m" else ("", rest)


def main(descriptor: int) -> None:
    """Import everything, then carry out each command in a fork."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `trainer.cli` does before torch is imported
    # Without wandb: its import chooses folders and random names, which all forks would share.
    for name in (*IMPORTED, *MODULES.values(), *FURTHER_PARTS):
        importlib.import_module(name)
    for name in MODULES.values():
        if name not in OURS:  # runpy warns of a module that is imported before it is run
            package, _, part = name.rpartition(".")
            delattr(sys.modules[package], part)
            del sys.modules[name]
    compose([])  # finds Hydra's plugins, and fills the caches of its parser
    HydraConfig.instance().cfg = None
    del sys.modules["conf"]  # each command looks for it again, since a folder of the user may hide it
    # A fork need not take down what imports made, such as torch's operators.
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        finalizer.atexit = False
    gc.collect()
    gc.freeze()
    try:
        _carry_out(_serve(socket.socket(fileno=descriptor)))
    except SystemExit as error:
        _end(error.code)
        raise
    _end(0)


def _end(code: object) -> None:
    """End the process as Python does, but leave its memory to the kernel.

    Python would visit every object of all imports, which copies the pages that the fork shares. It takes longer than
    most commands.
    """
    if not isinstance(code, int | None):
        return  # Python prints it
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except (OSError, ValueError):
            return  # Python complains of it, with a code of its own
    os._exit(code or 0)


def _serve(connection: socket.socket) -> Request:
    """Fork for each request. Returns in the fork; ends this process when the caller has ended."""
    signal.pthread_sigmask(
        signal.SIG_SETMASK, signal.valid_signals()
    )  # a signal waits until the fork can have it
    try:
        connection.send(b"ready")
    except BrokenPipeError:  # the caller has ended already
        os._exit(0)
    while True:
        try:
            packed, descriptors, *_ = socket.recv_fds(connection, _MAX_REQUEST_BYTES, 64)
        except ConnectionError:
            packed = b""
        if not packed:
            os._exit(0)
        request: Request = pickle.loads(packed)
        for name in request.variables.get(FURTHER_IMPORTS.encode(), b"").decode().split():
            if name not in sys.modules:
                with suppress(ImportError):  # the command reports what it misses
                    importlib.import_module(name)
                gc.freeze()
        reader, writer = os.pipe()
        between = os.fork()
        if between == 0:
            own = os.getpid()
            if os.fork():
                os._exit(0)
            while os.getppid() == own:  # until the kernel has given this process to the caller
                time.sleep(0.001)
            report = fcntl.fcntl(writer, fcntl.F_DUPFD, max(request.descriptors) + 1)
            os.close(reader)
            os.close(writer)
            connection.close()
            _take_over(request, descriptors)
            os.write(report, str(os.getpid()).encode())  # only now, so that a signal to its group reaches it
            os.close(report)
            signal.pthread_sigmask(signal.SIG_SETMASK, request.blocked)
            return request
        os.waitpid(between, 0)
        for each in (*descriptors, writer):
            os.close(each)
        answer = os.read(reader, 64)
        os.close(reader)
        with suppress(BrokenPipeError):
            connection.send(answer)


def _take_over(request: Request, descriptors: Sequence[int]) -> None:
    """Give this process what a program that is started has from the process that starts it, except the signal mask."""
    if request.session:
        os.setsid()
    else:
        with suppress(ProcessLookupError, PermissionError):  # the group has ended meanwhile
            os.setpgid(0, request.group)
    # High numbers first: a received number may be the target of another.
    above = max(request.descriptors) + 1
    high = [fcntl.fcntl(each, fcntl.F_DUPFD, above) for each in descriptors]
    for each in descriptors:
        os.close(each)
    for each, number in zip(high, request.descriptors, strict=True):
        os.dup2(each, number, inheritable=True)
        os.close(each)
    if request.terminal:
        take_terminal()
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        if number in (signal.SIGPIPE, *request.ignored):
            signal.signal(number, signal.SIG_IGN)
        elif number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
        else:
            with suppress(OSError):  # two of them are the C library's own
                signal.signal(number, signal.SIG_DFL)
    os.chdir(request.folder)
    os.environb.clear()
    os.environb.update(request.variables)
    _show_environment(request.variables)


def _show_environment(variables: dict[bytes, bytes]) -> None:
    """Let `/proc/PID/environ` show these variables: torchrun's workers are found by theirs.

    It shows the memory in which the interpreter got its variables. They were removed before, so nothing else uses it.
    """
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = (int(fields[number - 3]) for number in (50, 51))  # proc_pid_stat(5)
    shown = b"".join(key + b"=" + value + b"\0" for key, value in variables.items())
    assert len(shown) <= end - start
    ctypes.memset(start, 0, end - start)
    ctypes.memmove(start, shown, len(shown))


def _carry_out(request: Request) -> None:
    """Become the command. It ends as Python does, with its exit code."""
    module, _ = _module(request.words)
    if module != "trainer":  # which starts no command of this project
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if os.fork() == 0:
            ours.close()
            for each in request.descriptors[3:]:  # such as a lock, which the command alone is to hold
                os.close(each)
            _carry_out(_serve(theirs))
            return
        theirs.close()
        inner = Server(ours)
        _start_by(lambda: inner)
    _run(request)


def _run(request: Request) -> None:
    _open_streams(unbuffered=bool(os.environ.get("PYTHONUNBUFFERED")) or "-u" in request.words[1:2])
    import numpy as np
    import torch

    np.random.seed()  # its global generator is copied by a fork; Python's own begins anew
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0)))))
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    installed = [path for path in sys.path if path.startswith(sys.base_prefix) or "site-packages" in path]
    program = request.words[0]
    module, rest = (TORCHRUN, request.words[1:]) if program == "torchrun" else _module(request.words)
    first = str(Path(sys.executable).parent) if program in ("polyak", "torchrun") else request.folder
    if _is_script(request.words):
        first = "" if rest[0] == "-c" else str((Path(request.folder) / rest[0]).parent)
    if os.environ.get("PYTHONSAFEPATH"):
        # Our commands remove the first place, since the flag of the interpreter says that it was not left out.
        first = os.devnull
    sys.path[:] = [first, *paths, *installed]
    sys.argv = list(request.words) if program == "polyak" else ["-m", *rest]
    if all(_is_found_here(package) for package in OURS):
        if program != "polyak" and module not in ("", TORCHRUN):
            sys.modules["trainer"].begin_program()  # as when a command imports it
        if os.environ.get(WITHOUT_PICTURES):
            vars(sys.modules["trainer.report"])["_draw"] = lambda *_: {}
    else:
        for name in [name for name in sys.modules if name.split(".")[0] in OURS]:
            del sys.modules[name]
    if module == TORCHRUN:
        # For its debug log it asks which function calls it, which takes long where many modules are imported.
        vars(importlib.import_module(RENDEZVOUS))["get_method_name"] = lambda depth=2: ""
    if program == "polyak":
        from launch.console import main

        sys.exit(main())
    if _is_script(request.words):
        if rest[0] == "-c":
            sys.argv = ["-c", *rest[2:]]
            sys.modules["__main__"] = ModuleType("__main__")
            exec(rest[1], vars(sys.modules["__main__"]))
        else:
            sys.argv = rest
            runpy.run_path(rest[0], run_name="__main__")
    else:
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def _open_streams(unbuffered: bool) -> None:
    """Open the standard streams as an interpreter does at its start."""
    sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", closefd=False)  # type: ignore[misc]  # noqa: SIM115
    for number, name, errors in ((1, "stdout", "strict"), (2, "stderr", "backslashreplace")):
        file = io.FileIO(number, "w", closefd=False)
        stream = io.TextIOWrapper(
            file if unbuffered else io.BufferedWriter(file),
            encoding="utf-8",
            errors=errors,
            line_buffering=number == 2 or os.isatty(number),
            write_through=unbuffered,
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _is_found_here(package: str) -> bool:
    places = (Path(path) for path in sys.path)
    found = (place for place in places if (place / package).is_dir() or (place / f"{package}.py").is_file())
    return next(found, None) == REPOSITORY
