"""A step of the trainer against the same step written by hand, and against Lightning's Trainer.

    python -m tests.benchmarks.bench_step [--small] [--json PATH]

All train one model from the same weights on the same batches, with the same AdamW, clipping and average, in one
process and on one thread. The trainer's side is its own command line and its own `fit`. Lightning's is its `fit` in
barebones mode, with the hand-written loop's loss and average. That they do the same work is checked after the
warm-up: live and averaged weights must agree. The hand-written loop runs twice: how far its ratio to itself is from 1
is what cannot be told from noise.
"""

import argparse
import contextlib
import copy
import gc
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor

from tests.benchmarks.by_hand import DECAY, Gate, Side, hand_written
from tests.benchmarks.rounds import Spread, StepTime, Turns, keep_freed_memory, ratio, take_turns, write_json
from trainer.build import Parts, build, build_evaluated, make_run
from trainer.checkpoint.saving import Ways
from trainer.checkpoint.series import Series
from trainer.config.compose import compose
from trainer.config.schema import Config
from trainer.distributed.processes import Processes, join, leave
from trainer.loggers import make_loggers
from trainer.loggers.progress import Progress
from trainer.loop.fit import Callbacks, fit
from trainer.session import claim, open_session

LOG_EVERY = 10
NEVER = 10**9
RUN = (
    "experiment=quickstart",
    "schedule.warmup_steps=0",
    "optimizer.lr=1e-3",  # calm enough that rounding does not grow before the weights are compared
    "logger=none",  # metrics.jsonl is written all the same
    "trainer.device=cpu",
    "trainer.num_threads=1",
    f"trainer.steps={NEVER}",
    f"trainer.eval_every={NEVER}",
    "trainer.save_every=0",
)
"""The quickstart without evaluations and checkpoints, and without an end."""
COMMAND = (*RUN, f"ema.decay={DECAY}")  # one average, as the other loops have
SMALL = ("model.n_layer=2", "model.n_embd=64", "trainer.global_batch_size=8")
HAND, AGAIN, LIGHTNING = "hand-written", "hand-written, again", "Lightning"
TRAINER, LOGGING = "trainer", f"trainer, log_every={LOG_EVERY}"
TARGETS = {(TRAINER, HAND): 1.03, (LOGGING, HAND): 1.03, (TRAINER, LIGHTNING): 1.0, (LOGGING, LIGHTNING): 1.0}
"""Largest median ratio of wall time that is aimed at, for the quickstart's model."""
WARMUP = LOG_EVERY
"""Steps before the first round."""
SAME_WORK = {"cpu": 1e-5, "cuda": 3e-4}
"""Largest relative L2 distance between two loops' weights after the warm-up, by device. Rounding leaves 1e-8 on a CPU,
and more on a GPU, which adds in no fixed order; without clipping, without the exemption from weight decay, with another
decay or the batches one later it is about 1e-3 or more."""


def our_trainer(command: Sequence[str], place: Path, processes: Processes) -> tuple[Config, Parts, Side]:
    """The trainer as its command line assembles it, with the display, the log and the snapshots that a run has."""
    session = open_session(*compose([*command, f"run_dir={place}"]))
    config = session.config
    parts = build(
        config,
        session.averages,
        build_evaluated(config, session.averages, processes, session.allowed),
        session.allowed,
    )
    run_dir = claim(session, parts, {}).run_dir
    run = make_run(config, parts)
    loggers = make_loggers(config.logger, run_dir=run_dir.path, run_id="", run_config={}, resumed_at=None)
    display = Progress(config.trainer.steps, stream=io.StringIO())
    series = None
    if config.ema.snapshots:
        ways = Ways(display.note, background=True)
        series = Series(run_dir.snapshots, ways, config.ema, config.trainer.steps, dict)

    def loop(gate: Gate) -> None:
        with series or contextlib.nullcontext():
            if series is not None:
                series.begin(run, display.note)
            fit(
                run,
                Callbacks(
                    parts.evaluation,
                    loggers,
                    display,
                    save=lambda run, last: None,
                    stop_requested=gate,
                    after_step=[] if series is None else [series.after_step],
                ),
            )
        loggers.close({}, 0)

    def averaged() -> list[Tensor]:
        average = next(iter(run.bank.values()))
        target = copy.deepcopy(run.network.module)
        average.copy_to(target)
        return list(target.parameters())

    run.before_change = [] if series is None else [series.before_change]
    return config, parts, Side(loop, lambda: list(run.network.module.parameters()), averaged)


@contextlib.contextmanager
def all_sides(overrides: Sequence[str], leave_out: Sequence[str] = ()) -> Iterator[dict[str, Side]]:
    """Yield every loop but those to `leave_out`; none has begun yet."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        never, often = (f"trainer.log_every={steps}" for steps in (NEVER, LOG_EVERY))
        first = compose([*COMMAND, *overrides, never])
        processes = join(open_session(*first).config.trainer)
        try:
            config, parts, alone = our_trainer(
                [*COMMAND, *overrides, never], Path(folder, "alone"), processes
            )
            _, _, logging_too = our_trainer([*COMMAND, *overrides, often], Path(folder, "logging"), processes)
            sides = {HAND: hand_written(config, parts), AGAIN: hand_written(config, parts)}
            if LIGHTNING not in leave_out:
                from tests.benchmarks.by_lightning import lightning_trainer  # a package that may be missing

                sides[LIGHTNING] = lightning_trainer(config, parts)
            yield {**sides, TRAINER: alone, LOGGING: logging_too}
        finally:
            leave()


def check_same_work(sides: dict[str, Side]) -> None:
    """Refuse to compare loops that trained different weights."""

    def flat(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([tensor.detach().reshape(-1).double() for tensor in tensors])

    for name, side in sides.items():
        for kind, own, by_hand in (
            ("live", side.live(), sides[HAND].live()),
            ("averaged", side.averaged(), sides[HAND].averaged()),
        ):
            distance = float((flat(own) - flat(by_hand)).norm() / flat(by_hand).norm())
            if not distance <= SAME_WORK[own[0].device.type]:
                raise SystemExit(
                    f"{name}: its {kind} weights differ by {distance:.1e} from the {HAND} loop's"
                )


def measure(sides: dict[str, Side], arguments: argparse.Namespace) -> dict[str, list[StepTime]]:
    """Warm up, check, and time in rounds."""
    loops = [Turns(name, side.loop) for name, side in sides.items()]
    for loop in loops:
        loop.take(WARMUP)
    check_same_work(sides)
    # What the imports and the set-up left behind is no loop's own garbage.
    gc.collect()
    gc.freeze()
    times = take_turns(loops, arguments.rounds, arguments.steps)
    for loop in loops:
        loop.close()
    return times


def compared(times: dict[str, list[StepTime]]) -> dict[str, dict[str, Any]]:
    """Ratios of every pair of interest, by its name."""
    found = {}
    for of, to in [*TARGETS, (LIGHTNING, HAND), (AGAIN, HAND)]:
        found[f"{of} / {to}"] = {
            "wall": ratio([t.wall for t in times[of]], [t.wall for t in times[to]]),
            "cpu": ratio([t.cpu for t in times[of]], [t.cpu for t in times[to]]),
            "target": TARGETS.get((of, to)),
        }
    return found


def show(times: dict[str, list[StepTime]], ratios: dict[str, Any], *, small: bool) -> None:
    """Print what was found: median and, in brackets, quartiles over the rounds."""
    steps = Table("loop", "ms per step, wall", "ms per step, CPU of its thread")
    for name, own in times.items():
        wall, cpu = (Spread.of([1e3 * getattr(t, clock) for t in own]) for clock in ("wall", "cpu"))
        steps.add_row(name, f"{wall.median:.2f}", f"{cpu.median:.2f}")
    pairs = Table("ratio within a round", *(Column(name, no_wrap=True) for name in ("wall", "CPU", "target")))
    for name, row in ratios.items():
        target = "" if small or row["target"] is None else f"{row['target']:.2f}"
        if target:
            target += " kept" if row["wall"].median <= row["target"] else " missed"
        pairs.add_row(name, str(row["wall"]), str(row["cpu"]), target)
    Console().print(steps, pairs)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], prog="python -m tests.benchmarks.bench_step"
    )
    parser.add_argument("--rounds", type=int, default=30, help="rounds in which every loop has its turn")
    parser.add_argument(
        "--steps", type=int, default=LOG_EVERY, help=f"steps of a turn, a multiple of {LOG_EVERY}"
    )
    parser.add_argument(
        "--small", action="store_true", help="a model so small that overheads are a larger share"
    )
    parser.add_argument("--json", type=Path, help="file to write")
    arguments = parser.parse_args()
    if arguments.rounds < 2 or arguments.steps < 1 or arguments.steps % LOG_EVERY:
        # Else some turns would hold more logged steps than others.
        parser.error(f"expected at least 2 rounds, and turns of a multiple of {LOG_EVERY} steps")
    keep_freed_memory()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    with all_sides(SMALL if arguments.small else ()) as sides:
        times = measure(sides, arguments)
    ratios = compared(times)
    show(times, ratios, small=arguments.small)
    if arguments.json:
        settings = {"rounds": arguments.rounds, "steps": arguments.steps, "small": arguments.small}
        write_json(
            arguments.json,
            {"lightning": version("lightning"), "settings": settings, "ratios": ratios, "times": times},
        )


if __name__ == "__main__":
    main()
