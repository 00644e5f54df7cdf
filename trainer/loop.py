"""The main loop. It drives protocols and callables only: no class of a model, a task or a logger.

    for each step:  batch -> accumulate -> clip -> finite? -> optimizer -> EMA
    then, if due:   log, evaluate, save

The step never waits for the device: whether it was finite stays on the device until a value is logged.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from ema import EMABank
from trainer.config.schema import TrainerConfig
from trainer.distributed.sharding import Network
from trainer.errors import NonFiniteStep
from trainer.optim import clip_grad_norm, set_lr, step_unless
from trainer.protocols import Batch, Logger, SampleRandom, Task


class Measure(Protocol):
    """Measures a logged step."""

    def before(self, run: "Run") -> None:
        """Copy what the optimizer is about to change; does not wait for the device."""

    def __call__(self, run: "Run", loss: Tensor, grad_norm: Tensor) -> dict[str, float]:
        """Return the record of the step; waits for the device."""
        ...


class Display(Protocol):
    """Shows how far the run is."""

    def update(self, step: int) -> None: ...

    def report(self, step: int, record: dict[str, float]) -> None: ...


class Clock:
    """Wall seconds spent training since the last logged step, without evaluations and checkpoints.

    A device works asynchronously, so only whole intervals are timed: each ends where a value is logged, which waits
    for the device.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin a new interval."""
        self.steps = 0
        self.ema_s = 0.0
        self._begin = time.perf_counter()

    def elapsed_s(self) -> float:
        """Return the seconds of this interval so far."""
        return time.perf_counter() - self._begin

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of this block out."""
        begin = time.perf_counter()
        yield
        self._begin += time.perf_counter() - begin

    @contextmanager
    def ema_update(self) -> Iterator[None]:
        """Time the averages' update; on a device, the time to launch it."""
        begin = time.perf_counter()
        yield
        self.ema_s += time.perf_counter() - begin


@dataclass
class Run:
    """What a step needs and changes; `trainer.build.make_run` makes it, `fit` drives it."""

    config: TrainerConfig
    network: Network
    task: Task
    batches: Iterator[Batch]
    """Micro-batches from the current step on, `config.accumulate` of them a step, on the device."""
    random: Callable[[int, int], SampleRandom]
    """`random(step, micro)`: the random numbers of a micro-batch's samples."""
    reseed: Callable[[int], None]
    """`reseed(step)` makes dropout a pure function of the step."""
    optimizer: Optimizer
    lr: Callable[[int], float]
    """Learning rate of a step, counted from 1."""
    bank: EMABank
    measure: Measure
    skipped: Tensor
    """int64 on the device: steps not taken because they were not finite."""
    step: int = 0
    """Optimizer steps done."""
    clock: Clock = field(default_factory=Clock)

    @property
    def finished(self) -> bool:
        """Whether every step is done."""
        return self.step >= self.config.steps


@dataclass(frozen=True)
class Callbacks:
    """What the loop calls between two steps."""

    evaluate: Callable[[Network, EMABank], dict[str, float]]
    logger: Logger
    display: Display
    save: Callable[[Run], object]
    """Write and commit a checkpoint of this moment."""
    stop_requested: Callable[[], bool]
    """Whether all ranks agreed to stop; called once a step."""


def fit(run: Run, callbacks: Callbacks) -> None:
    """Train until all steps are done or all ranks agree to stop, and save the last state.

    Raises:
        NonFiniteStep: under `trainer.non_finite=stop`, at the first logged step after it happened.
    """
    run.network.forward.train()
    while not run.finished:
        loss, grad_norm = train_step(run, run.step + 1)
        run.step += 1
        run.clock.steps += 1
        callbacks.display.update(run.step)
        report(run, callbacks, loss, grad_norm)
        stop = callbacks.stop_requested()
        if stop or run.finished or is_due(run.step, run.config.save_every):
            with run.clock.paused():
                callbacks.save(run)
        if stop:
            return


def train_step(run: Run, step: int) -> tuple[Tensor, Tensor]:
    """Take one optimizer step; return this rank's mean loss and the global gradient norm, both on the device."""
    run.reseed(step)
    total = torch.zeros((), device=run.network.device)
    for micro in range(run.config.accumulate):
        batch = next(run.batches)
        with run.network.accumulating(last=micro == run.config.accumulate - 1):
            with run.network.autocast():
                losses = run.task.losses(run.network.forward, batch, run.random(step, micro))
            loss = losses.mean() / run.config.accumulate
            loss.backward()
        total += loss.detach()
    trained = [parameter for group in run.optimizer.param_groups for parameter in group["params"]]
    grad_norm = clip_grad_norm(trained, run.config.max_grad_norm)
    finite = grad_norm.isfinite()
    set_lr(run.optimizer, run.lr(step))
    if is_logged(run, step):
        run.measure.before(run)
    step_unless(run.optimizer, finite)
    run.optimizer.zero_grad(set_to_none=True)
    run.network.sync_buffers()
    run.skipped += ~finite
    with run.clock.ema_update():
        run.bank.update(run.network.module, iteration=step, finite=finite)
    return total, grad_norm


def report(run: Run, callbacks: Callbacks, loss: Tensor, grad_norm: Tensor) -> None:
    """Log and evaluate what is due at this step, as one record of training and evaluation metrics."""
    record: dict[str, float] = {}
    if is_logged(run, run.step):
        record |= run.measure(run, loss, grad_norm)
        if run.config.non_finite == "stop" and run.skipped:
            raise NonFiniteStep(
                f"trainer.non_finite=stop: step {run.step} or one shortly before it had a non-finite gradient norm"
            )
    if is_due(run.step, run.config.eval_every) or run.finished:
        with run.clock.paused():
            record |= callbacks.evaluate(run.network, run.bank)
    if record:
        callbacks.logger.log(run.step, record)
        callbacks.display.report(run.step, record)


def is_logged(run: Run, step: int) -> bool:
    """Return whether the training metrics of `step` are logged."""
    return is_due(step, run.config.log_every) or step >= run.config.steps


def is_due(step: int, every: int) -> bool:
    """Return whether something that happens every `every` steps happens now; never for 0."""
    return every > 0 and step % every == 0
