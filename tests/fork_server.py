"""Server that imports the packages of this project once and forks for each command that `tests.forked` asks for.

The fork becomes the command: it takes over what a new process has from the one that starts it, runs the module or
script as an interpreter does, and ends with its exit code.
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
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType

from hydra.core.hydra_config import HydraConfig

from tests.forked import (
    FURTHER_IMPORTS,
    REPOSITORY,
    TORCHRUN,
    WITHOUT_PICTURES,
    Request,
    Server,
    is_script,
    module_of,
    skip_syncs,
    start_by,
    take_terminal,
)
from trainer.config.compose import compose
from trainer.shell.commands import MODULES

RENDEZVOUS = "torch.distributed.elastic.rendezvous.dynamic_rendezvous"
OURS = ("conf", "ema", "models", "trainer", "launch")
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


def main(descriptor: int) -> None:
    """Import everything, then carry out each command in a fork."""
    skip_syncs()
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
    os.environb.pop(FURTHER_IMPORTS.encode(), None)
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
    module, _ = module_of(request.words)
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
        start_by(lambda: inner)
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
    module, rest = (TORCHRUN, request.words[1:]) if program == "torchrun" else module_of(request.words)
    first = str(Path(sys.executable).parent) if program in ("polyak", "torchrun") else request.folder
    if is_script(request.words):
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
    if is_script(request.words):
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
