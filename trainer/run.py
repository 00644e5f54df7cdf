"""One run from its configuration to its report: build, claim the directory, restore, train, report.

Nothing is written before everything that the user could have got wrong was built, so bad input leaves no
half-made run directory.
"""

import dataclasses
import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from trainer.build import Parts, build, sample_random, step_random, training_batches
from trainer.checkpoint.resume import carry_on
from trainer.checkpoint.store import newest_checkpoint, save_checkpoint
from trainer.checkpoint.training_state import training_state
from trainer.config.compose import NOT_THE_SCIENCE, freeze, resume_config, to_config, without_clearing
from trainer.config.schema import Config, TrainerConfig
from trainer.config.targets import trusted_targets
from trainer.config.validate import ema_warnings, refuse_ignored, validate
from trainer.distributed.failures import EXIT_FAILED, await_end, explain, lost_others
from trainer.distributed.processes import Processes, agree, gather, join, leave, meeting, on_main, together
from trainer.distributed.sharding import forget_meshes
from trainer.distributed.stop import StopSignal
from trainer.distributed.torchrun import Job, launched_nodes, launched_world_size, own_agent
from trainer.errors import ConfigError
from trainer.evaluation.evaluation import all_metric_facts, metric_facts
from trainer.finish import NextCommands, draw_samples, print_result, write_result
from trainer.loggers import Loggers, NullLogger, make_loggers
from trainer.loggers.progress import NullProgress, Progress
from trainer.loop import NotSaved, Run, fit
from trainer.rundir.directory import RunDir, begun_by, default_run_dir
from trainer.rundir.lock import PATIENCE_S
from trainer.seeding import seed_step
from trainer.step_metrics import TrainMetrics

EXIT_DONE = 0
EXIT_STOPPED = 75


@dataclasses.dataclass
class Session:
    """One launch of a run: a run that is interrupted and carried on has several."""

    config: Config
    frozen: str
    """The resolved configuration as YAML."""
    overrides: list[str]
    allowed: list[str]
    """Prefixes of `_target_` that this command line trusts, besides the built-in ones."""
    resumed: RunDir | None
    """The run directory to carry on: `resume=`, or what this torchrun command began before it restarted."""


def run(composed: DictConfig, overrides: list[str]) -> int:
    """Carry out one run, new or resumed, in all its processes; returns the exit code.

    Raises:
        ConfigError: bad input that every rank sees before it joins the others; later ones are printed here.
    """
    session = open_session(composed, overrides)
    return in_all_processes(
        session.config.trainer, session.frozen, lambda processes: _carry_out(session, processes)
    )


def in_all_processes(settings: TrainerConfig, frozen: str, work: Callable[[Processes], int]) -> int:
    """Join the processes that torchrun started, do `work` in each, and say why if it fails; returns the exit code.

    Args:
        settings: how to join.
        frozen: the configuration as YAML, the same on all ranks or refused.
        work: returns an exit code.

    Raises:
        ConfigError: bad input that every rank sees before it joins the others; later ones are printed here.
    """
    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)
    try:
        processes = join(settings)
        _check_same_config(frozen, processes)
        code = work(processes)
        forget_meshes()
        return code
    except Exception as error:
        code = explain(error, settings)
        leave()
        if lost_others(error):
            await_end()
        return code
    finally:
        leave()


def open_session(composed: DictConfig, overrides: list[str]) -> Session:
    """Settle the configuration of this launch: the same on every rank, without talking to the others.

    Raises:
        ConfigError: naming the key.
    """
    resumed, cfg = None, composed
    if composed.resume is not None:
        resumed = RunDir.open(composed.resume)
        cfg = resume_config(resumed.latest_config(), composed, overrides)
    config = to_config(cfg)
    validate(config, launched_world_size())
    refuse_ignored(config, without_clearing(overrides))
    allowed = [*composed.allow_targets, *trusted_targets(overrides)]
    return Session(config, freeze(cfg), overrides, allowed, resumed)


def _check_same_config(frozen: str, processes: Processes) -> None:
    """Every rank composed its own configuration: refuse to go on if they differ (another code version, say)."""
    own = hashlib.sha256(frozen.encode()).hexdigest()
    same = own == on_main(processes, lambda: own, "comparing configurations")
    agree(processes, None if same else ConfigError("config: this process composed another one than rank 0"))


def _carry_out(session: Session, processes: Processes) -> int:
    config = session.config
    with meeting("building the run"):
        parts = build(config, processes, session.allowed)
    processes = parts.processes
    run_dir = claim(session, processes, parts)
    with ExitStack() as stack, StopSignal(timeout_s=config.trainer.timeout_s) as signals:
        patience_s = min(PATIENCE_S, config.trainer.timeout_s / 2)  # the others wait for rank 0
        has_locks = on_main(
            processes, lambda: stack.enter_context(run_dir.in_use(patience_s)), "locking the run directory"
        )
        describe(run_dir, processes, parts)
        checkpoint = on_main(
            processes, lambda: newest_checkpoint(run_dir.checkpoints), "finding the newest checkpoint"
        )
        state = assemble(config, processes, parts, run_dir)
        state.stop_requested = signals.requested
        with meeting("loading the checkpoint"):
            averages_changed = (
                together(processes, lambda: carry_on(config, run_dir, state, checkpoint))
                if checkpoint
                else []
            )
        if session.resumed is not None:
            on_main(
                processes,
                lambda: run_dir.record_session(
                    session.frozen,
                    overrides=session.overrides,
                    facts=all_metric_facts(run_dir.meta, parts.evaluation),
                ),
                "noting the session",
            )
        state.batches = training_batches(config, parts, processes, state.step)
        notes = opening_notes(config, run_dir, state, averages_changed)
        if not has_locks:
            notes.append(f"warning: {run_dir.path}: no locks on this file system; start no second run in it")
        with observers(session, processes, parts, run_dir, state, notes) as summary:
            with meeting("training"):
                fit(state)
            if state.finished:
                images = draw_samples(state, sample_random(config, parts.task, processes))
                if processes.is_main:
                    summary |= write_result(run_dir.path, images, state.logger, state.step)
    if processes.is_main:
        print_ending(state, run_dir, session, processes)
    return EXIT_DONE if state.finished else EXIT_STOPPED


def claim(session: Session, processes: Processes, parts: Parts) -> RunDir:
    """The run directory: made by rank 0 in a first session and opened by all, or the one that is carried on.

    A torchrun command that restarts its processes carries on what it began itself, named or not.

    Raises:
        ConfigError: on every rank, if the directory exists or cannot be made.
    """
    config = session.config
    if session.resumed is not None:
        return session.resumed
    job = Job.of(gather(processes, own_agent()))
    place = Path(config.run_dir) if config.run_dir else None

    def make() -> tuple[str, bool]:
        begun = begun_by(job, place)
        if begun is not None:
            return str(begun.path), True
        created = RunDir.create(
            place or default_run_dir(config.experiment, job),
            config_yaml=session.frozen,
            overrides=session.overrides,
            meta={
                "experiment": config.experiment,
                "torchrun_agents": job.agents if job else [],
                **_facts(processes, parts),
            },
        )
        return str(created.path), False

    path, begun_before = on_main(processes, make, "claiming the run directory")
    run_dir = RunDir.open(path, key="run_dir")
    if begun_before:
        session.resumed = run_dir
    return run_dir


def describe(run_dir: RunDir, processes: Processes, parts: Parts) -> None:
    """Note in `meta.json` what only a run knows that is built, if the directory was prepared from outside.

    Collectives: one object broadcast.
    """

    def note() -> None:
        if "primary_metric" not in run_dir.meta:
            run_dir.update_meta(**_facts(processes, parts))

    on_main(processes, note, "describing the run")


def _facts(processes: Processes, parts: Parts) -> dict[str, Any]:
    return {
        "world_size": processes.world_size,
        "nodes": launched_nodes(),
        **metric_facts(parts.evaluation),
    }


def assemble(config: Config, processes: Processes, parts: Parts, run_dir: RunDir) -> Run:
    """The loop's view of the parts, at step 0, with nobody watching."""

    def save(run: Run) -> None:
        try:
            with meeting(f"saving the checkpoint of step {run.step}"):
                save_checkpoint(
                    run_dir.checkpoints, run.step, state_of(run), keep=run.config.keep_checkpoints
                )
        except OSError as error:  # the same on every rank
            reason = error.strerror or error
            raise NotSaved(f"{run_dir.checkpoints}: step {run.step} cannot be written: {reason}") from error

    return Run(
        config=config.trainer,
        network=parts.network,
        task=parts.task,
        batches=iter(()),
        random=lambda step, micro: step_random(config, processes, step, micro),
        reseed=lambda step: seed_step(config.seed, step, processes.data_rank),
        optimizer=parts.optimizer,
        lr=lambda step: config.optimizer.lr * parts.lr_factor(step),
        bank=parts.bank,
        evaluate=parts.evaluation,
        measure=TrainMetrics(
            config.trainer,
            tokens_per_sample=parts.tokens_per_sample,
            flops_per_sample=parts.flops_per_sample,
        ),
        logger=NullLogger(),
        display=NullProgress(),
        save=save,
        stop_requested=lambda: False,
        skipped=torch.zeros((), dtype=torch.int64, device=processes.device),
    )


def state_of(run: Run) -> dict[str, Any]:
    """All that a checkpoint holds. Data order, noise and dropout are functions of the step and need no state."""
    return {
        **training_state(run.network.module, run.optimizer),
        "ema": {name: average.state_dict() for name, average in run.bank.items()},
        "progress": {"step": run.step, "skipped": int(run.skipped), "averages": list(run.bank)},
    }


@contextmanager
def observers(
    session: Session, processes: Processes, parts: Parts, run_dir: RunDir, run: Run, notes: list[str]
) -> Iterator[dict[str, float | str]]:
    """On rank 0, the loggers and the display of the run; on the others nobody watches.

    Yields:
        The summary that the loggers close with, to be filled.

    Raises:
        ConfigError: on every rank, if a logger does not start; a run directory just made is removed.
    """
    made: list[Loggers] = []

    def start() -> None:
        loggers = make_loggers(
            session.config.logger,
            run_dir=run_dir.path,
            run_id=run_dir.meta["wandb_run_id"],
            run_config=dataclasses.asdict(dataclasses.replace(session.config, **NOT_THE_SCIENCE)),
            resumed_at=run.step if session.resumed else None,
            allowed=session.allowed,
        )
        made.append(loggers)
        run.logger = loggers

    try:
        on_main(processes, start, "starting the loggers")
    except ConfigError:
        if processes.is_main and session.resumed is None:
            shutil.rmtree(run_dir.path)
        raise
    summary: dict[str, float | str] = {}
    code = EXIT_FAILED
    try:
        if processes.is_main:
            with Progress(
                session.config.trainer.steps,
                start_step=run.step,
                metric=parts.task.primary_metric,
                higher_is_better=parts.task.primary_metric in parts.task.higher_is_better,
            ) as progress:
                run.display = progress
                for note in notes:
                    progress.note(note)
                yield summary
        else:
            yield summary
        code = EXIT_DONE if run.finished else EXIT_STOPPED
    finally:
        run.logger.close(summary, code)
        if code != EXIT_DONE:  # else it is among what is printed at the end
            for command in filter(None, (loggers.sync_command for loggers in made)):
                print(f"wandb is offline; upload with: {command}")


def opening_notes(config: Config, run_dir: RunDir, run: Run, averages_changed: list[str]) -> list[str]:
    """What the user should know before the first step."""
    notes = [f"run directory: {run_dir.path}"]
    if run.step:
        notes.append(f"goes on from step {run.step}")
    rules = {name: average.rule for name, average in run.bank.items() if average.rule is not None}
    live_dtype = str(next(run.network.module.parameters()).dtype).removeprefix("torch.")
    warnings = ema_warnings(config, rules, live_dtype)
    return notes + averages_changed + [f"warning: {warning}" for warning in warnings]


def print_ending(run: Run, run_dir: RunDir, session: Session, processes: Processes) -> None:
    """The table and what to type next, or how to go on."""
    commands = NextCommands(run_dir, session.allowed, processes.world_size, launched_nodes())
    if run.finished:
        print_result(run_dir.path)
        sync = run.logger.sync_command if isinstance(run.logger, Loggers) else None
        print("Next:", *commands.after_finish(session.config.trainer.steps, sync), sep="\n  ")
    else:
        print(f"stopped at step {run.step}, saved; go on with: {commands.resume()}")
