"""The main loop. It uses protocols and callables only, no class of a model, a task or a logger.

    once:           EMA absorbs the first weights
    for each step:  batch -> accumulate -> clip -> finite? -> optimizer -> EMA
    then, if due:   log, evaluate, save

The step never waits for the device: the flag whether it was finite stays there until a value is logged.
"""

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from ema import EMABank
from trainer.config.schema import TrainerConfig
from trainer.distributed.processes import raised_together
from trainer.distributed.sharding import Network
from trainer.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, ConfigError, NonFiniteStep, listed
from trainer.loop.misfits import PARTS, check_gradients, fitting
from trainer.loop.teachers import Losses, losses_of, of_averages
from trainer.optimizers import LossScale, clip_grad_norm, set_lr, step_unless
from trainer.protocols import Batch, Logger, SampleRandom, Task
from trainer.rundir.keys import LIVE, evaluation_key


class Measure(Protocol):
    """Function that computes the training metrics of a logged step."""

    def before(self, run: "Run") -> None:
        """Copy the live weights before the optimizer changes them, without waiting for the device."""

    def __call__(self, run: "Run", loss: Tensor, grad_norm: Tensor) -> dict[str, float]:
        """Wait for the device and return the metrics of the step."""


class Display(Protocol):
    """Display of the progress of a run."""

    def update(self, step: int) -> None: ...

    def note(self, text: str) -> None: ...

    def report(self, step: int, record: dict[str, float]) -> None: ...


class Hooks(Protocol):
    """Receiver of the user's own callbacks (`trainer.loop.hooks`)."""

    def after_step(self, record: dict[str, float]) -> None:
        """Call what is due after a step; `record` is empty if nothing was logged."""


class Clock:
    """Clock of the training time since the last logged step, without evaluations and checkpoints.

    A device works asynchronously, so only whole intervals are measured. Each one ends when a value is logged, because
    logging waits for the device.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Set the measured time and the number of steps to zero, after a logged step."""
        self.steps = 0
        self.ema_s = 0.0
        self._begin = time.perf_counter()

    def elapsed_s(self) -> float:
        """Return the seconds of training since the last logged step."""
        return time.perf_counter() - self._begin

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time of the block from the measured time."""
        begin = time.perf_counter()
        yield
        self._begin += time.perf_counter() - begin

    @contextmanager
    def ema_update(self) -> Iterator[None]:
        """Add the time of the block to `ema_s`, the time of the averages' updates; on a GPU, their launch time."""
        begin = time.perf_counter()
        yield
        self.ema_s += time.perf_counter() - begin


@dataclass
class Run:
    """State of the training loop; `trainer.build.make_run` makes it, and `fit` changes it."""

    config: TrainerConfig
    network: Network
    task: Task
    batches: Generator[Batch, None, None]
    """Micro-batches on the device from the current step on (`trainer.data.batches.train_batches`), `accumulate` per
    step; closing ends its workers."""
    random: Callable[[int, int], SampleRandom]
    """Function `random(step, micro)` that returns the random numbers for the samples of a micro-batch
    (`trainer.seeding`)."""
    reseed: Callable[[int], None]
    """Function `reseed(step)` that seeds torch, so that dropout is a pure function of the step (`trainer.seeding`)."""
    optimizer: Optimizer
    peak_lr: float
    """Learning rate that is logged, at its peak; a group of parameters may have its own."""
    lr_factor: Callable[[int], float]
    """Function from a step, counted from 1, to the factor of all learning rates (`trainer.optimizers.schedule`)."""
    bank: EMABank
    measure: Measure
    skipped: Tensor
    """Number of steps skipped because they were not finite, int64 on the device."""
    micro_batch_size: int | None = None
    """Number of losses that a micro-batch must have; None for any number."""
    loss_scale: LossScale | None = None
    """Factor of the loss in float16; None in other dtypes."""
    skipped_before: int = 0
    """How many of them earlier sessions skipped."""
    failed_before: bool = False
    """Whether the session before failed, as `failed` says."""
    diverged: bool = False
    """Whether the last step of the run was skipped and the live weights have a metric that is not finite."""
    step: int = 0
    """Number of optimizer steps done."""
    samples: int = 0
    """Number of training samples that these steps used."""
    without_gradient: list[str] | None = None
    """Trainable parameters that the first step of this session gave no gradient; None before that step."""
    clock: Clock = field(default_factory=Clock)
    before_change: Sequence[Callable[[], object]] = ()
    """Functions that return when the optimizer and the averages may change: a checkpoint has a copy of them."""

    def __post_init__(self) -> None:
        self._start = self.step

    def lr(self, step: int) -> float:
        """Return the learning rate of a step, counted from 1, without those of groups of parameters."""
        return self.peak_lr * self.lr_factor(step)

    @cached_property
    def losses(self) -> Losses:
        """The training loss of the task: `task.losses`, with the averages as teachers if it takes `averages`."""
        return losses_of(self.task, of_averages(self.bank, self.network))

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.config.steps

    @property
    def skipped_now(self) -> int:
        """Number of steps that this session skipped; waits for the device."""
        return int(self.skipped) - self.skipped_before

    @property
    def skipped_all(self) -> bool:
        """Whether this session skipped all its steps; without steps, whether the session before did."""
        steps = self.step - self._start
        return self.skipped_now == steps if steps else self.failed_before

    @property
    def failed(self) -> bool:
        """Whether this session left weights that cannot be trained, or skipped all its steps."""
        return self.diverged or self.skipped_all

    @property
    def exit_code(self) -> int:
        """Exit code of a session that ends now."""
        if not self.finished:
            return EXIT_STOPPED
        return EXIT_FAILED if self.failed else EXIT_DONE


@dataclass(frozen=True)
class Callbacks:
    """Functions and objects that the loop calls between two steps."""

    evaluate: Callable[[Network, EMABank], dict[str, float]]
    logger: Logger
    display: Display
    save: Callable[[Run, bool], object]
    """Function `save(run, last)` that saves a checkpoint of the current state; the last one is on disk afterwards."""
    stop_requested: Callable[[], bool]
    """Function that returns whether all ranks agreed to stop; called once per step."""
    save_requested: Callable[[], bool] = lambda: False
    """Function that returns whether all ranks agreed to save after this step; called after `stop_requested`."""
    after_step: Sequence[Callable[[Run], object]] = ()
    """Functions called after each step, before a checkpoint of it."""
    hooks: Hooks | None = None
    """The user's own callbacks; None if there are none."""


def fit(run: Run, callbacks: Callbacks) -> None:
    """Train until all steps are done or all ranks agree to stop, and save the last state.

    Raises:
        NonFiniteStep: A step was not finite under `trainer.non_finite=stop`; raised at the next logged step.
        ConfigError: The parts of the run do not fit together; the message names them.
    """
    run.network.forward.train()
    while not run.finished:
        is_first, place = run.without_gradient is None, f"in step {run.step + 1}"
        with raised_together(place), fitting(PARTS, place, any_error=is_first):
            if is_first:
                absorb_first_weights(run)
            loss, grad_norm = train_step(run, run.step + 1)
        if is_first and run.without_gradient:
            names = listed(run.without_gradient)
            callbacks.display.note(
                f"warning: model: the loss gives no gradient to {names}; they stay as they are"
            )
        run.step += 1
        run.samples += run.config.global_batch_size
        run.clock.steps += 1
        callbacks.display.update(run.step)
        record = report(run, callbacks, loss, grad_norm)
        if callbacks.hooks is not None:
            callbacks.hooks.after_step(record)
        for call in callbacks.after_step:
            call(run)
        stop = callbacks.stop_requested()
        last = stop or run.finished
        if last or is_due(run.step, run.config.save_steps) or callbacks.save_requested():
            with run.clock.paused():
                callbacks.save(run, last)
        if stop:
            return


def absorb_first_weights(run: Run) -> None:
    """Update the averages that no update has reached yet with the present weights, before the first step.

    This defines the origin of a run's averages. In a new run the iteration is 0, and the weights are the initial ones
    or those of `init_from`. So an average with `start_iter=0` has the weights that `ema.rules.profile` gives. With a
    later start this update changes nothing, and the average first absorbs the weights of step `start_iter`. An average
    that is new in a resumed or forked run absorbs the loaded weights. A loaded average keeps its saved origin.

    Collectives: those of an update of the averages.
    """
    for average in run.bank.values():
        if not average.started and average.last_iteration < 0:
            average.update(run.network.module, iteration=run.step)


def train_step(run: Run, step: int) -> tuple[Tensor, Tensor]:
    """Do one optimizer step; return the mean loss of this rank and the global gradient norm, both on the device."""
    is_first = run.without_gradient is None
    run.reseed(step)
    run.network.buffers.save()
    total = torch.zeros((), device=run.network.device)
    for micro in range(run.config.accumulate):
        batch = next(run.batches)
        with run.network.accumulating(last=micro == run.config.accumulate - 1):
            with run.network.autocast():
                losses = run.losses(run.network.forward, batch, run.random(step, micro))
            if run.micro_batch_size is not None and losses.shape != (run.micro_batch_size,):
                raise ConfigError(
                    f"task, data: expected one loss for each of {run.micro_batch_size} samples in step {step}, got"
                    f" shape {tuple(losses.shape)}; a data set returns all samples that it is asked for"
                )
            loss = losses.mean() / run.config.accumulate
            (loss if run.loss_scale is None else run.loss_scale.scaled(loss)).backward()
        total += loss.detach()
    trained = [parameter for group in run.optimizer.param_groups for parameter in group["params"]]
    if is_first or (run.network.needs_all_gradients and any(parameter.grad is None for parameter in trained)):
        run.without_gradient = check_gradients(run.network)
    if run.loss_scale is not None:
        run.loss_scale.unscale(trained)
    grad_norm = clip_grad_norm(trained, run.config.max_grad_norm)
    finite = grad_norm.isfinite()
    set_lr(run.optimizer, run.lr_factor(step))
    if is_logged(run, step):
        run.measure.before(run)
    for call in run.before_change:
        call()
    with fitting(("optimizer",), f"in step {step}", any_error=is_first):
        step_unless(run.optimizer, finite)
    if run.loss_scale is not None:
        run.loss_scale.update(finite)
    run.optimizer.zero_grad(set_to_none=True)
    run.network.buffers.restore_unless(finite)
    run.network.buffers.share()
    run.skipped += ~finite
    with run.clock.ema_update():
        run.bank.update(run.network.module, iteration=step, finite=finite)
    return total, grad_norm


def report(run: Run, callbacks: Callbacks, loss: Tensor, grad_norm: Tensor) -> dict[str, float]:
    """Log the training metrics, and the evaluation metrics if an evaluation is due, as one record; return it."""
    record: dict[str, float] = {}
    if is_logged(run, run.step):
        record |= run.measure(run, loss, grad_norm)
        if run.config.non_finite == "stop" and run.skipped_now:
            raise NonFiniteStep(
                f"trainer.non_finite=stop: step {run.step} or one shortly before it had a non-finite gradient norm"
            )
    if is_due(run.step, run.config.eval_every) or run.finished:
        place = f"in the evaluation after step {run.step}"
        with run.clock.paused(), raised_together(place), fitting((*PARTS, "metrics"), place, any_error=False):
            record |= callbacks.evaluate(run.network, run.bank)
    if run.finished:
        of_live = [value for key, value in record.items() if key.startswith(evaluation_key(LIVE, ""))]
        run.diverged = not all(map(math.isfinite, of_live)) and not grad_norm.isfinite()
    if record:
        callbacks.logger.log(run.step, record)
        callbacks.display.report(run.step, record)
    return record


def is_logged(run: Run, step: int) -> bool:
    """Return whether the training metrics of `step` are logged."""
    return is_due(step, run.config.log_every) or step >= run.config.steps


def is_due(step: int, every: int) -> bool:
    """Return whether `step` is a multiple of `every`; False if `every` is 0."""
    return every > 0 and step % every == 0
