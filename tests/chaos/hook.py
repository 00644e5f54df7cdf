"""Do something to a process at the n-th event of a phase, without a line of it in the product.

An event is a file operation that Python audits, a call of a function of the tree, or an import of torch. This file
imports the standard library only: in a process of its own it is started by a `sitecustomize` (see `SITE`).
"""

import atexit
import json
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = str(Path(__file__).parents[2]) + os.sep
VARIABLE = "CHAOS_HOOK"
"""Environment variable with the JSON arguments of `arm`, for processes of their own."""
SITE = "from tests.chaos.hook import arm_by_environment\n\narm_by_environment()\n"
"""Content of the `sitecustomize.py` of such processes."""
FINAL = "step-00000012"
"""Name of the checkpoint of the last step."""
PAUSE_S = 60.0
"""Longest pause in seconds."""
STEP = r"^call trainer/loop/fit\.py:train_step$"
"""Pattern of one event per step."""

PHASES: dict[str, str] = {
    "import torch": r"^import torch\b",
    "building": r"^call trainer/build\.py:",
    "claiming the directory": r"^(mkdir|open|rename) (\.run\.\w+\.tmp|run/\.?meta\.json)",
    "before the first step": r"^call trainer/(session\.py:(describe|record|watching|_display)|loop/fit\.py:fit$)"
    r"|^open run/(run\.lock|metrics\.jsonl)",
    "training": r"^call (trainer/loop/fit\.py:train_step|trainer/optimizers/|ema/)",
    "logging": r"^call trainer/(loggers/jsonl|loop/step_metrics)\.py:",
    "evaluating": r"^call trainer/evaluation/",
    "taking the state": r"^call trainer/checkpoint/((training_state|staging)\.py:|saving\.py:state_of)",
    "writing tensors": r"^(mkdir|open|rename) run/checkpoints/step-\d+\.tmp($|/__|/\.metadata)",
    "before the commit": r"^(open|rename|remove) run/checkpoints/step-\d+\.tmp(/\.?state\.json| -> )",
    "between rename and marker": r"^(open|rename) run/checkpoints/step-\d+/\.COMMIT\.json",
    "pruning": r"^(rmtree|rmdir) run/checkpoints/|^remove (run/checkpoints/step-\d+/COMMIT\.json|[^/]+)$",
    "final save": rf"^\w+ run/checkpoints/{FINAL}",
    "report": r"^(mkdir|open|rename) run/report",
    "exit": r"^call trainer/(run\.py:_print_ending|distributed/processes\.py:leave)|^exit",
}
"""Pattern of the events of each phase. The text of an event is its verb and its path relative to the current folder."""
_VERBS = {
    "open": "open",
    "os.mkdir": "mkdir",
    "os.rename": "rename",
    "os.remove": "remove",
    "os.rmdir": "rmdir",
    "shutil.rmtree": "rmtree",
}


class Hook:
    """Count the events of the phases in this process, and act once at one of them."""

    def __init__(self, phases: Mapping[str, str], act: Callable[[str, int], bool]) -> None:
        """Prepare; `act(phase, number)` returns whether it acted, after which nothing is observed any more."""
        self.counts = Counter[str]()
        self._patterns = {phase: re.compile(pattern) for phase, pattern in phases.items()}
        self._act = act
        self._phases: dict[CodeType, list[str]] = {}
        self._busy = False
        self._here = os.getcwd() + os.sep

    def start(self) -> None:
        """Observe this process from now on."""
        sys.addaudithook(self._audited)
        if any("call " in pattern.pattern for pattern in self._patterns.values()):
            # A trace function that returns None gets no lines of the function. A profiler would also get each C call.
            threading.settrace(self._called)
            sys.settrace(self._called)
        atexit.register(self._event, "exit")

    def _event(self, text: str) -> None:
        if not self._busy:
            self._count(self._phases_with(text))

    def _phases_with(self, text: str) -> list[str]:
        return [phase for phase, pattern in self._patterns.items() if pattern.search(text)]

    def _count(self, phases: Iterable[str]) -> None:
        for phase in phases:
            self.counts[phase] += 1
            self._busy = True
            self._busy = self._act(phase, self.counts[phase])

    def _audited(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "import":
            self._event(f"import {arguments[0]}")
        elif event in _VERBS and not (event == "open" and not _writes(arguments)):
            paths = arguments[: 1 + (event == "os.rename")]
            relative = [os.path.abspath(path).removeprefix(self._here) for path in map(_text, paths)]
            # shutil.rmtree removes names relative to a descriptor.
            names = relative if os.sep in _text(paths[0]) else list(map(_text, paths))
            self._event(f"{_VERBS[event]} {' -> '.join(names)}")

    def _called(self, frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or self._busy:
            return
        code = frame.f_code
        phases = self._phases.get(code)
        if phases is None:
            inside = code.co_filename.startswith(ROOT)
            name = f"call {code.co_filename.removeprefix(ROOT)}:{code.co_qualname}"
            phases = self._phases[code] = self._phases_with(name) if inside else []
        if phases:
            self._count(phases)


def _text(path: Any) -> str:
    return os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else f"descriptor {path}"


def _writes(arguments: tuple[Any, ...]) -> bool:
    flags = arguments[2]
    return isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR) != 0


def kill_group() -> None:
    """Kill this process with all of its group, as a machine that loses its power does."""
    os.killpg(0, signal.SIGKILL)


def kill_job() -> None:
    """Kill the torchrun that started this process, all its ranks and this process."""
    agent = os.getppid()
    ranks = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    for pid in (agent, *map(int, ranks)):
        if pid != os.getpid():
            os.kill(pid, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def kill_self() -> None:
    """Kill this process alone."""
    os.kill(os.getpid(), signal.SIGKILL)


def send(number: int) -> None:
    """Send a signal to this process."""
    os.kill(os.getpid(), number)


def send_agent(number: int) -> None:
    """Send a signal to the torchrun that started this process."""
    os.kill(os.getppid(), number)


def fill(path: str) -> None:
    """Write a file until its file system is full."""
    block = bytes(1 << 16)
    with open(path, "wb", buffering=0) as file:
        while block:
            try:
                while True:
                    file.write(block)
            except OSError:
                block = block[: len(block) // 2]


def copy_image(source: str, target: str) -> None:
    """Copy the image of a mounted file system as it is at one moment, and list the checkpoints committed by then."""
    before = None
    while (now := Path(source).read_bytes()) != before:
        before = now
    committed = sorted(path.parent.name for path in Path("run/checkpoints").glob("step-*/COMMIT.json"))
    Path(f"{target}.json").write_text(json.dumps(committed))
    Path(target).write_bytes(now)


def pause(path: str) -> None:
    """Wait until a file exists."""
    until = time.monotonic() + PAUSE_S
    while not os.path.exists(path) and time.monotonic() < until:
        time.sleep(0.02)


ACTIONS: dict[str, Callable[..., None]] = {
    action.__name__: action
    for action in (kill_group, kill_job, kill_self, send, send_agent, fill, copy_image, pause)
}


def arm(phase: str, number: int, action: str, *arguments: Any, done: str) -> None:
    """Carry out an action at the n-th event of a phase of this process.

    Args:
        phase: key of `PHASES`, or a pattern of events.
        number: number of the event, from 1.
        action: key of `ACTIONS`.
        arguments: arguments of the action.
        done: path of a file that is made just before the action, as a proof that the phase was hit.
    """

    def act(_: str, count: int) -> bool:
        if count != number:
            return False
        Path(done).write_text(f"{phase} {number} at {time.time()}\n")
        ACTIONS[action](*arguments)
        return True

    Hook({phase: PHASES.get(phase, phase)}, act).start()


def count(path: str) -> None:
    """Write the number of events of each phase in this process to a file when it ends."""
    hook = Hook(PHASES, lambda phase, number: False)
    hook.start()
    atexit.register(
        lambda: Path(path).write_text(json.dumps({**hook.counts, "exit": hook.counts["exit"] + 1}))
    )


def arm_by_environment() -> None:
    """Do what `VARIABLE` asks for, in one rank and one attempt of it."""
    wanted = json.loads(os.environ.get(VARIABLE, "{}"))
    if not wanted or os.environ.get("RANK", "0") != str(wanted["rank"]):
        return
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" or wanted["needs_rank"] != (
        "RANK" in os.environ
    ):
        return
    arm(*wanted["arm"], done=wanted["done"])
