"""One run from its configuration to its report: build, claim the directory, restore, train, report.

The run directory is made after all objects are built, so bad input leaves no directory behind.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from omegaconf import DictConfig

from ema import EMABank, ExponentialMovingAverage
from trainer.build import Parts, build, build_evaluated, make_run, sample_random
from trainer.checkpoint.continuity import ended_failed, session_facts
from trainer.checkpoint.on_checkpoint import OnCheckpoint
from trainer.checkpoint.resume import Start, continue_from
from trainer.checkpoint.saving import Saver, Ways
from trainer.checkpoint.series import Series, set_aside_later
from trainer.checkpoint.store import newest_checkpoint
from trainer.config.averages import grown_averages
from trainer.config.schema import Config
from trainer.distributed.failures import in_all_processes
from trainer.distributed.processes import Processes, agreeing, meeting, on_main
from trainer.distributed.sharding import Network, reshard
from trainer.distributed.stop import StopSignal
from trainer.distributed.torchrun import launched_nodes, launched_world_size
from trainer.errors import EXIT_DONE, EXIT_FAILED, ConfigError, NotSaved
from trainer.evaluation.axis import Evaluate, EvaluationOfAxis
from trainer.evaluation.first_forward import refuse_typed
from trainer.evaluation.samples import SAMPLES, EvaluationWithGrid, draw_samples
from trainer.finish import NextCommands, print_result, summarise, write_result
from trainer.loop.fit import Callbacks, Run, fit
from trainer.loop.hooks import Hooks, View
from trainer.report.runs import Run as Report
from trainer.report.runs import read_run
from trainer.rundir.checkpoints import step_of
from trainer.rundir.directory import FORK, ORIGIN, RunDir, sha256_of
from trainer.rundir.records import last_step
from trainer.rundir.same_place import SamePlace
from trainer.session import (
    Session,
    Watchers,
    claim,
    continues,
    describe,
    in_use,
    open_session,
    opening_notes,
    record,
    refuse_other_beginning,
    watching,
)
from trainer.shell.commands import command_lines
from trainer.shell.printable import print_text
from trainer.shell.terminal import interrupted_at_once
from trainer.weights.fork import Fork, open_fork
from trainer.weights.load import start_from

OF_TRAINING = ("model", "task", "data", "ema", "optimizer", "schedule", "seed")
"""Keys that change what the next steps do."""
SKIPPED_ALL = (
    "the last session skipped all its steps, or its last ones and the loss is not finite, because their gradients were"
    " not finite"
)


def run(composed: DictConfig, overrides: list[str]) -> int:
    """Carry out one run, new or resumed, in all its processes; return the exit code.

    Raises:
        ConfigError: Bad input that every rank detects before it joins the others; later errors are printed here.
    """
    session = open_session(composed, overrides)
    alone = launched_world_size() == 1
    if alone and (code := _code_if_done(session)) is not None:
        return code  # before anything is built

    def work(processes: Processes) -> int:
        # What one rank sees of a shared file system may be older than what another sees.
        code = None if alone else on_main(lambda: _code_if_done(session), "reading whether the run is done")
        return _carry_out(session, processes) if code is None else code

    return in_all_processes(session.config, work)


def _code_if_done(session: Session) -> int | None:
    """Print that a resumed run is done and return its exit code; None if there is something to do.

    It is done if it has its checkpoint and its record of the last step, and a report that is newer than these.
    """
    run_dir, steps = session.resumed, session.config.trainer.steps
    if run_dir is None:
        return None
    checkpoint, page = newest_checkpoint(run_dir.checkpoints), run_dir.report / "index.html"
    if checkpoint is None or step_of(checkpoint) != steps or not page.is_file():
        return None
    records = run_dir.metrics_path
    # The page is the last file of a report. A page older than the records is that of an earlier session.
    if last_step(records) != steps or page.stat().st_mtime_ns < records.stat().st_mtime_ns:
        return None
    refuse_other_beginning(run_dir, session.config)
    if idle := [one for one in session.overrides if re.match(rf"[+~]*({'|'.join(OF_TRAINING)})\b", one)]:
        print_text(f"note: no step is left, so these have no effect: {' '.join(idle)}")
    failed = ended_failed(checkpoint)
    again = _next_commands(session, run_dir).resume(f"trainer.steps={2 * steps}")
    state = f"all {steps} steps are done and reported" + (f", but {SKIPPED_ALL}" if failed else "")
    print_text(f"{run_dir.path}: {state}; trainer.steps=N continues it: {again}")
    return EXIT_FAILED if failed else EXIT_DONE


def _carry_out(session: Session, processes: Processes) -> int:
    with interrupted_at_once():  # parts import packages when they are built
        evaluated = build_evaluated(session.config, session.averages, processes, session.allowed)
        refuse_typed(evaluated.primary_faults, session.overrides)
        if evaluated.primary_faults and not continues(session)[0]:
            raise ConfigError(evaluated.primary_faults[0])
        config = evaluated.config
        session = replace(session, config=config)
        beginning = _beginning(session, evaluated.network)
        parts = build(config, session.averages, evaluated, session.allowed)
        # Before the claim: if the checkpoint does not fit, no directory is made.
        first = _forked(config, parts, beginning.fork)
    claimed = claim(session, parts, beginning.provenance)
    run_dir = claimed.run_dir
    timeout_s = config.trainer.timeout_s
    signals = StopSignal(timeout_s=timeout_s, save_after_s=config.trainer.save_s)
    with signals, in_use(run_dir, timeout_s) as has_locks:
        describe(run_dir, parts, beginning.provenance)
        start = _restore(config, parts, run_dir) or first
        notes = record(session, claimed, parts, start)
        run = make_run(config, parts, step=start.step, samples=start.samples, skipped=start.skipped)
        if run.finished:  # nothing is left to do but the report
            run.failed_before = on_main(
                lambda: ended_failed(newest_checkpoint(run_dir.checkpoints)),
                "reading how the last session ended",
            )
        with watching(session, claimed, parts, run, start.covered) as watchers:
            origin = [*claimed.notes, *beginning.notes, *notes]
            for note in opening_notes(session, parts, run_dir, start, origin, has_locks):
                watchers.display.note(note)
            done = _train(session, parts, run, run_dir, watchers, signals)
    if processes.is_main:
        _print_ending(session, run, run_dir, done, watchers)
    return run.exit_code


def _train(
    session: Session, parts: Parts, run: Run, run_dir: RunDir, watchers: Watchers, signals: StopSignal
) -> Report | None:
    """Do the steps that are left, and write the report if all are done; return its data on rank 0."""
    place = SamePlace(run_dir.path, run_dir.checkpoints) if parts.processes.is_main else None
    text = session.config.trainer.on_checkpoint if parts.processes.is_main else None
    command = None if text is None else OnCheckpoint(text, run_dir.path, watchers.display.note)
    saver, series = _savers(session, parts, run, run_dir, watchers, place, command)
    hooks = Hooks(parts.callbacks, View(run, run_dir.path), saver.committed) if parts.callbacks else None
    callbacks = Callbacks(
        evaluate=_evaluate(session.config, parts, run, run_dir, watchers),
        logger=watchers.loggers,
        display=watchers.display,
        save=lambda run, last: saver.save(run, last=last),
        stop_requested=lambda: signals.requested(also=watchers.loggers.failed),
        save_requested=lambda: signals.save_requested,
        after_step=[] if series is None else [series.after_step],
        hooks=hooks,
    )
    run.before_change = [one.before_change for one in (saver, series) if one is not None]
    with meeting("training"), closing(run.batches), saver, series or nullcontext():
        for line in on_main(lambda: set_aside_later(run_dir.snapshots, run.step), "finding the snapshots"):
            watchers.display.note(line)
        if series is not None:
            series.begin(run, watchers.display.note)
        fit(run, callbacks)
    if not run.finished:
        on_main(watchers.loggers.raise_failure, "stopping")
    done = _report(session, parts, run, run_dir, watchers, place) if run.finished else None
    if hooks is not None:
        hooks.at_end()
    if command is not None:
        command.finish(
            session.config.trainer.timeout_s, lambda: not run.finished or signals.received is not None
        )
        saver.prune_released()
    return done


def _evaluate(
    config: Config, parts: Parts, run: Run, run_dir: RunDir, watchers: Watchers
) -> Callable[[Network, EMABank], dict[str, float]]:
    """Return what the loop calls for an evaluation."""
    keep = watchers.loggers.keep_pairs if parts.processes.is_main else None
    note = watchers.display.note
    evaluate: Evaluate
    if config.trainer.sample_grids:
        random = sample_random(config, run.task, parts.processes)
        folder = run_dir.path / SAMPLES if parts.processes.is_main else None
        evaluate = EvaluationWithGrid(run, parts.evaluation, keep, random, folder, watchers.loggers, note)
    else:

        def evaluate(network: Network, averages: Mapping[str, ExponentialMovingAverage]) -> dict[str, float]:
            return parts.evaluation(network, averages, step=run.step, full=run.finished, keep=keep)

    if not config.ema.axis:
        return evaluate
    return EvaluationOfAxis(
        parts.evaluation, evaluate, note, further=grown_averages(config), steps=config.trainer.steps
    )


def _savers(
    session: Session,
    parts: Parts,
    run: Run,
    run_dir: RunDir,
    watchers: Watchers,
    place: SamePlace | None,
    command: OnCheckpoint | None,
) -> tuple[Saver, Series | None]:
    """Return what saves the checkpoints of this session, and what keeps snapshots of its averages, if any are left."""
    config, config_sha256 = session.config, sha256_of(session.frozen)
    once = cache(watchers.display.note)  # shows each text once
    ways = Ways(once, config.trainer.async_save, parts.processes.timeout, place)
    saver = Saver(
        run_dir.checkpoints,
        ways,
        keep=config.trainer.keep_checkpoints,
        session=lambda: session_facts(config_sha256, watchers.loggers.sync(), skipped_all=run.failed),
        evaluation=parts.evaluation,
        command=command,
    )
    if not config.ema.snapshots or not run.bank or run.finished:
        return saver, None
    return saver, Series(
        run_dir.snapshots, ways, config.ema, config.trainer.steps, lambda: session_facts(config_sha256, {})
    )


@dataclass(frozen=True)
class _Beginning:
    """What a run begins with if it has no checkpoint of its own."""

    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Entries of `meta.json` on it."""
    notes: Sequence[str] = ()
    fork: Fork | None = None
    """Checkpoint of another run; None for initial weights and those of `init_from`."""


def _beginning(session: Session, network: Network) -> _Beginning:
    """Load the weights of `init_from` or open the checkpoint of `fork`, unless the run continues from its own."""
    config = session.config
    if config.init_from is None and config.fork is None:
        return _Beginning()
    has_checkpoint, recorded = continues(session)
    if has_checkpoint:
        return _Beginning()
    if config.fork is not None:
        text = config.fork
        # Rank 0 chooses: the other run may be writing checkpoints.
        fork = on_main(lambda: open_fork(text, config.trainer.steps, recorded), "opening the run to fork")
        return _Beginning(
            {FORK: fork.facts}, [f"forks {fork.run_dir.path} at step {fork.facts['step']}"], fork
        )
    assert config.init_from is not None
    reshard(network.module)
    origin = start_from(config.init_from, config.init, network.module)
    where = [f"{name} {origin.facts[name]}" for name in ("weights", "step", "entry") if name in origin.facts]
    notes = [f"starts from {', '.join([origin.facts['path'], *where])}", *origin.notes]
    return _Beginning({ORIGIN: origin.facts}, notes)


def _forked(config: Config, parts: Parts, fork: Fork | None) -> Start:
    """Load the checkpoint of the run to fork, if there is one; return the step to start from."""
    if fork is None:
        return Start()
    with agreeing("loading the checkpoint to fork", collectives=True):
        return continue_from(fork.checkpoint, parts, config, fork.run_dir, key="fork")


def _restore(config: Config, parts: Parts, run_dir: RunDir) -> Start | None:
    """Load the run's newest checkpoint, and return the step to start from; None without a checkpoint."""
    checkpoint = on_main(lambda: newest_checkpoint(run_dir.checkpoints), "finding the newest checkpoint")
    with agreeing("loading the checkpoint", collectives=True):
        return continue_from(checkpoint, parts, config, run_dir) if checkpoint else None


def _report(
    session: Session, parts: Parts, run: Run, run_dir: RunDir, watchers: Watchers, place: SamePlace | None
) -> Report | None:
    """Draw samples on all ranks; on rank 0 write the report and return its data.

    Raises:
        NotSaved: The report cannot be written, or the run directory was moved; raised on every rank.
    """
    drawn = draw_samples(run, parts.evaluation, sample_random(session.config, run.task, parts.processes))
    with agreeing("writing the report", NotSaved):
        if place is None:
            return None
        place.check()
        done = read_run(run_dir.path)
        try:
            following = _next_commands(session, run_dir)
            blocks = following.after_finish(done)
            write_result(done, drawn, watchers.loggers, run.step, blocks, following.allowed)
        except OSError as error:
            reason = error.strerror or error
            raise NotSaved(
                f"{run_dir.report}: cannot be written: {reason}; all steps are saved, and resume= writes the report"
            ) from error
    watchers.summary.update(summarise(done))
    return done


def _print_ending(
    session: Session,
    run: Run,
    run_dir: RunDir,
    done: Report | None,
    watchers: Watchers,
) -> None:
    """Print the skipped steps, the result and the next commands; for a stopped run, the command that continues it."""
    if skipped := int(run.skipped):
        print(f"skipped {skipped} of {run.step} steps, because their gradients were not finite")
    if run.finished and run.failed:
        print(f"exit code {EXIT_FAILED}: {SKIPPED_ALL}")
    commands = _next_commands(session, run_dir)
    if done is None:
        title = f"stopped at step {run.step} and saved; continue with:"
        print(*command_lines(title, [commands.resume()]), sep="\n")
        return
    print_result(done)
    for block in commands.after_finish(done, watchers.loggers.sync_command):
        print(*block, sep="\n")


def _next_commands(session: Session, run_dir: RunDir) -> NextCommands:
    typed = session.overrides if session.resumed is None else None
    return NextCommands(run_dir, typed, session.allowed, launched_world_size(), launched_nodes())
