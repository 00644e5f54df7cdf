"""Run a command in all its processes; if one fails, print its whole error and one line per other rank.

A rank that fails by itself prints its traceback before it leaves the process group, so the other ranks fail after the
traceback is printed. They print one line and wait, because torchrun ends all ranks as soon as one rank has ended, and
its summary names the rank that ended first.
"""

import hashlib
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from queue import Empty, SimpleQueue

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from trainer.config.frozen import freeze_config
from trainer.config.schema import Config, TrainerConfig
from trainer.distributed.processes import (
    Processes,
    agreeing,
    gather,
    join,
    leave,
    meet_at_the_end,
    previous_error,
    raised_on,
    roll_call,
)
from trainer.distributed.torchrun import complain, launched_rank, launched_world_size, own_agent
from trainer.errors import (
    EXIT_BAD_INPUT,
    EXIT_FAILED,
    ConfigError,
    DataFailure,
    NonFiniteStep,
    NotSaved,
    message_of,
    place_of,
)

END_TIMEOUT_S = 5.0
"""Seconds that a rank which lost the others waits until torchrun ends it; torchrun checks ten times a second."""

CAUSE_PATIENCE_S = 5.0
"""Seconds that a rank whose wait for the others is over leaves a slower rank to print the cause first."""

# gloo raises plain RuntimeErrors; their messages contain the path of a source file of gloo.
_GLOO = re.compile(r"\bgloo/|\bGloo\b|\[monitored_barrier\]|monitoredBarrier")
# "timed out connecting" means that the connection was refused several times, so it is not a time-out.
_TIME_OUT = re.compile(r"timed out (?!connecting)|timeout", re.IGNORECASE)


class MissingRanks(Exception):
    """Other ranks did not arrive within `trainer.timeout_s`."""


def in_all_processes(config: Config, work: Callable[[Processes], int]) -> int:
    """Run `work` in each process that torchrun started, and return the exit code; print the error if it fails.

    Args:
        config: configuration, the same on all ranks; its group `trainer` has the device and the time-out.
        work: function that returns an exit code.

    Raises:
        ConfigError: Every rank detects bad input before it joins the others. Later errors are printed, not raised.
        SystemExit: Code of a part called `sys.exit`; with its exit code, or 1 in place of 0.
    """
    settings = config.trainer
    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)
    with ExitStack() as end:
        try:
            processes = join(settings)
            if processes.world_size > 1:
                _check_same_config(config)
            code = work(processes)
            if code:  # torchrun would end rank 0 while it still prints and closes the loggers
                meet_at_the_end()
        except Exception as error:
            if lost_others(error):
                end.enter_context(awaiting_end())
            code = explain(error, settings)
        except SystemExit as error:
            complain(
                RuntimeError(
                    f"{place_of(error)}: the code of a part ended the process by sys.exit({error.code!r})"
                )
            )
            if not error.code:  # the work is not done, so no scheduler may read that it is
                raise SystemExit(EXIT_FAILED) from error
            raise
        finally:
            leave()  # an error that was printed is gone by now, and with it the frames that refer to the model
    return code


def _check_same_config(config: Config) -> None:
    """Raise a ConfigError on every rank if the configurations differ, for example by different versions of the code."""
    own = hashlib.sha256(freeze_config(config).encode()).hexdigest()
    with agreeing("comparing configurations"):
        if own != gather(own)[0]:
            raise ConfigError(
                "config: expected the same configuration on all ranks, this rank's differs from rank 0"
            )


def explain(error: Exception, config: TrainerConfig) -> int:
    """Print on stderr why this rank ends, and return its exit code; call it before the rank leaves its group.

    Raises:
        Exception: There is no other rank, or every rank raises this error; `error` is raised so that Python prints it.
    """
    failure = _data_failure(error)
    if failure is not None and raised_on(error) in (None, launched_rank()):
        complain(failure)
        _record_cause(failure)
        return EXIT_FAILED
    loss = _loss(error)
    if loss is not None:
        missing = _missing_ranks(config) if _TIME_OUT.search(str(loss)) else None
        if missing is None:
            _print(_lost_ranks_message(loss))
        else:
            _print(f"error: {missing}")
            get_error_handler().record_exception(missing)
        return EXIT_FAILED
    origin = raised_on(error)
    if isinstance(error, ConfigError):
        if origin is not None:  # every rank raises the same error
            if launched_rank() == 0:
                complain(error, origin)
            meet_at_the_end()
            return EXIT_BAD_INPUT
        if not dist.is_initialized():  # every rank detects the bad input by itself
            raise error
        complain(error)
        return EXIT_BAD_INPUT
    if isinstance(error, NonFiniteStep | NotSaved):  # every rank raises the same error
        if launched_rank() == 0:
            _print(f"error: {error}")
        return EXIT_FAILED
    if launched_world_size() == 1:
        raise error
    if origin not in (None, launched_rank()):
        _print(f"rank {launched_rank()}: ends because rank {origin} failed; see its error")
        return EXIT_FAILED
    sys.excepthook(type(error), error, error.__traceback__)
    _record_cause(error)
    return EXIT_FAILED


def _record_cause(error: BaseException) -> None:
    """Record a printed error for torchrun's summary, and for ranks whose wait ends at about the same time."""
    get_error_handler().record_exception(error)
    if (roll := roll_call()) is not None:
        roll.explain()


def lost_others(error: Exception) -> bool:
    """Return whether this rank failed only because another rank failed; False for a time-out."""
    loss = _loss(error)
    if loss is not None:
        return not _TIME_OUT.search(str(loss))
    return not isinstance(error, ConfigError | NotSaved) and raised_on(error) not in (None, launched_rank())


@contextmanager
def awaiting_end() -> Iterator[None]:
    """Wait after the block for the SIGTERM with which torchrun ends this rank, at most END_TIMEOUT_S.

    torchrun reports the first rank that ends as the cause of the failure. This rank is not the cause. The signal may
    come within the block. It does not end this rank, so that Python's exit removes the temporary folders of libraries
    (wandb has two). Without torchrun there is no wait.
    """
    if own_agent() is None:
        yield
        return
    signals: SimpleQueue[int] = SimpleQueue()  # unlike an Event, a handler may always put into it
    signal.signal(signal.SIGTERM, lambda number, _: signals.put(number))
    yield
    sys.stdout.flush()
    with suppress(Empty):
        signals.get(timeout=END_TIMEOUT_S)


def _loss(error: BaseException) -> BaseException | None:
    """Return the error of the process group or its store that caused `error`; None if there is none."""
    if launched_world_size() == 1:
        return None
    return next((cause for cause in _chain(error) if is_loss(cause)), None)


def _data_failure(error: BaseException) -> DataFailure | None:
    """Return the failure of the data that caused `error`, None if there is none.

    torch raises the end of a DataLoader worker in a signal handler, so wherever the main thread is at that time.
    """
    lost = None
    for cause in _chain(error):
        if isinstance(cause, DataFailure):
            return cause
        if isinstance(cause, RuntimeError) and str(cause).startswith("DataLoader worker"):
            lost = cause  # the earliest one has the signal
    if lost is None:
        return None
    hint = " (too little memory?)" if "Killed" in str(lost) else ""
    failure = DataFailure(f"data: {message_of(lost).rstrip('. ')}{hint}")
    failure.__cause__ = error
    return failure


def is_loss(error: BaseException) -> bool:
    """Return whether this is an error of the process group or its store; another rank or the network has failed."""
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError):
        return True
    return isinstance(error, RuntimeError) and _GLOO.search(str(error)) is not None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = previous_error(error)


def _place() -> str:
    roll = roll_call()
    return roll.place if roll is not None else "starting"


def _missing_ranks(config: TrainerConfig) -> MissingRanks | None:
    """Return which ranks did not come, or None if none is behind and another rank has printed why it left."""
    roll = roll_call()
    missing = roll.missing_ranks() if roll is not None else {}
    start = f"rank {launched_rank()}: waited {config.timeout_s:g} s (trainer.timeout_s)"
    if missing:
        names = ", ".join(f"rank {rank} (last seen {place})" for rank, place in missing.items())
        return MissingRanks(f"{start} while {_place()} for {names}")
    # All are in the same part of the run, and one of them may have waited for its data for as long.
    if roll is not None and roll.is_explained(CAUSE_PATIENCE_S):
        return None
    return MissingRanks(f"{start} for the other ranks while {_place()}")


def _lost_ranks_message(loss: BaseException) -> str:
    reason = re.sub(r"^\[.*?\] ", "", str(loss).splitlines()[0]).partition(". ")[0]
    return (
        f"rank {launched_rank()}: lost the other ranks while {_place()} ({reason});"
        " see the error of the rank that failed first; without one, torchrun was ended"
    )


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
