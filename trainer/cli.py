"""Run a command that may have several processes, and print bad input as one line.

Nothing here imports torch before `work` does.
"""

import atexit
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from trainer.distributed.torchrun import complain, launched_rank, launched_world_size
from trainer.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILED, ConfigError
from trainer.rundir.circumstances import versions
from trainer.shell.terminal import interrupted_at_once

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

EXIT_SIGNAL = 128
"""Offset of exit codes: a command ended by signal n returns 128 + n, as in a shell."""
END_S = 3.0
"""Seconds after a command's end until its process is ended by force; less than the other ranks wait for torchrun."""


def version() -> str:
    """Return the line that `--version` prints: the versions of this project and of torch, read without importing it."""
    found = versions()
    return f"polyak {found['polyak'] or 'not installed'} (torch {found['torch'] or 'not installed'})"


@contextmanager
def importing() -> Iterator[None]:
    """Context for imports of large packages: garbage collection pauses, and Ctrl-C ends the process at once.

    torch and its dependencies make 300,000 objects that live as long as the process. Without the pause Python searches
    them for garbage during the imports and again at the end, which takes a quarter of the time of a short run, and a
    tenth of that of `--cfg job`.
    """
    with interrupted_at_once():
        if "torch" in sys.modules or not gc.isenabled():  # the calling program controls garbage collection
            yield
            return
        gc.disable()
        try:
            yield
        finally:
            gc.freeze()
            gc.enable()
            atexit.register(gc.freeze)


def run_command(work: Callable[[], int], arguments: Sequence[str] = ()) -> int:
    """Call `work` and return its exit code; after a ConfigError print one line and return 2, and after Ctrl-C 130.

    With `--version` among the arguments, print the versions instead.
    """
    if "--version" in arguments:
        print(version())
        return EXIT_DONE
    # By default OpenMP's threads spin while they wait. That makes a step on two idle cores a quarter faster, and six
    # times slower when another program needs a core too. torch reads this variable when it is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        return work()
    except ConfigError as error:
        rank = launched_rank()
        if rank == 0:
            complain(error)
        if launched_world_size() > 1:
            from trainer.distributed.processes import leave, meet_at_the_end

            if not meet_at_the_end() and rank:  # only this rank has the error
                complain(error)
            leave()
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_SIGNAL + signal.SIGINT


def ending(main: Callable[[], int]) -> int:
    """Call `main` and return its exit code; what is left then is ended within `END_S`, so that Python can exit.

    Python waits without limit for threads and child processes that are left. The user's code may have started such, and
    a sweep would never start another run in the place of this one. Only a process that ends after `main` calls this.
    """
    code = EXIT_FAILED
    try:
        code = main()
        if code == EXIT_SIGNAL + signal.SIGINT:
            # Python then ends itself by SIGINT after it has cleaned up, so that a loop of the shell ends too.
            sys.excepthook = lambda *_: None  # the line is printed already
            raise KeyboardInterrupt
        return code
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else EXIT_FAILED if error.code else 0
        raise
    except KeyboardInterrupt:
        code = EXIT_SIGNAL + signal.SIGINT
        raise
    finally:
        if _left():
            with suppress(OSError):  # the reader of the output may have ended
                sys.stdout.flush()
            threading.Thread(target=_end_by_force, args=(code,), daemon=True).start()


def _left() -> list[str]:
    """Return a description of each thread and child process that Python's exit waits for."""
    here = (threading.current_thread(), threading.main_thread())
    threads = (thread for thread in threading.enumerate() if not thread.daemon and thread not in here)
    return [
        *(f"thread {thread.name}" for thread in threads),
        *(f"process {child.pid}" for child in _children()),
    ]


def _children() -> "list[BaseProcess]":
    if "multiprocessing" not in sys.modules:  # its import takes time, and without it there are none
        return []
    from multiprocessing import active_children

    return active_children()


def _end_by_force(code: int) -> None:
    threading.Event().wait(END_S)
    left = _left()
    if not left:  # Python's exit has gone on
        return
    message = f"warning: ended by force: {', '.join(left)} did not end within {END_S:g} s\n"
    os.write(2, message.encode())  # the main thread may hold the lock of sys.stderr
    for child in (children := _children()):
        child.kill()
    for child in children:
        child.join(END_S)
    os._exit(code)
