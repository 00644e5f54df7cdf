"""One session of a run: its configuration, its run directory, its records, its loggers and its display."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ema.config import EMAConfig
from trainer.build import Parts
from trainer.checkpoint.continuity import check_resumable
from trainer.checkpoint.resume import Start
from trainer.checkpoint.store import newest_checkpoint
from trainer.config.compose import to_config
from trainer.config.eval_sets import part_of_the_data
from trainer.config.frozen import freeze_config, plain_config, thaw
from trainer.config.own_code import TRAINED, refuse_untrusted
from trainer.config.schema import AUTO, Config, ShardingConfig
from trainer.config.trust import trusted_targets
from trainer.config.validate import reject_unused_overrides, validate
from trainer.distributed.processes import agreeing, gather, on_main
from trainer.distributed.torchrun import Job, is_restart, launched_nodes, launched_world_size, own_agent
from trainer.errors import EXIT_FAILED, ConfigError
from trainer.evaluation.custom import is_higher_better
from trainer.evaluation.evaluation import unfit_statistics
from trainer.evaluation.facts import all_metric_facts, metric_facts
from trainer.loggers import Loggers, make_loggers
from trainer.loggers.progress import NullProgress, Progress
from trainer.loop.fit import Run
from trainer.optimizers.schedule import warmup_warnings
from trainer.rundir.continuing import Covered, set_aside
from trainer.rundir.directory import FORK, RunDir, begun_by, default_run_dir
from trainer.rundir.inherited import inherit
from trainer.rundir.lock import PATIENCE_S
from trainer.rundir.pairs import PAIRS


@dataclass(frozen=True)
class Session:
    """Configuration and command line of one session; an interrupted and continued run has several sessions."""

    config: Config
    averages: dict[str, EMAConfig]
    """Settings of the averages by name."""
    overrides: list[str]
    allowed: list[str]
    """Prefixes of `_target_` that this command line allows, besides the built-in ones."""
    resumed: RunDir | None
    """Run directory of `resume=`; None for a new run."""

    @cached_property
    def frozen(self) -> str:
        """The configuration as YAML, made at the first use; the configuration does not change after that."""
        return freeze_config(self.config)


@dataclass(frozen=True)
class Claim:
    """The run directory of a session."""

    run_dir: RunDir
    is_new: bool
    """Whether this session made the directory; otherwise an earlier session did."""
    notes: Sequence[str] = ()
    """Messages for the user about what the session continues from."""


@dataclass(frozen=True)
class Watchers:
    """Loggers and display of a run; on ranks above 0 they do nothing."""

    loggers: Loggers
    display: Progress | NullProgress
    summary: dict[str, float | str] = field(default_factory=dict)
    """Summary that the loggers get when they are closed; filled when the run is done."""


def open_session(composed: DictConfig, overrides: list[str]) -> Session:
    """Return the session of this command line: resolve and check its configuration. No collective.

    Raises:
        ConfigError: The configuration is refused; names the key.
    """
    cfg, resumed = inherit(composed, overrides)
    config = to_config(cfg)
    averages = validate(config, launched_world_size())
    reject_unused_overrides(config, overrides)
    allowed = [*composed.allow_targets, *trusted_targets(overrides)]
    refuse_untrusted(config, allowed, TRAINED)
    return Session(config, averages, overrides, allowed, resumed)


def continues(session: Session) -> tuple[bool, Mapping[str, Any] | None]:
    """Return whether this session continues from a checkpoint of the run; then it has all weights.

    Returns:
        That, and the checkpoint from which an earlier process of the run forked it, as in `meta.json`.

    Raises:
        ConfigError: It does, and the command line names another beginning; raised on every rank.

    Collectives: an object all-gather and an object broadcast.
    """
    job = Job.of(gather(own_agent()))

    def find() -> tuple[bool, Mapping[str, Any] | None]:
        run_dir = session.resumed or begun_by(job, _place(session.config))
        if run_dir is None or newest_checkpoint(run_dir.checkpoints) is None:
            return False, None if run_dir is None else run_dir.meta.get(FORK)
        refuse_other_beginning(run_dir, session.config)
        return True, None

    return on_main(find, "looking for a checkpoint")


def refuse_other_beginning(run_dir: RunDir, config: Config) -> None:
    """Refuse a configuration that begins with other weights than the run in this directory did.

    Raises:
        ConfigError: It does; names the key.
    """
    before = to_config(thaw(run_dir.latest_config()))
    for key in ("fork", "init_from", "init"):
        if getattr(before, key) != getattr(config, key):
            raise ConfigError(
                f"{key}: {run_dir.path} continues from its checkpoint; start a new run from other weights"
            )


def _place(config: Config) -> Path | None:
    return Path(config.run_dir) if config.run_dir else None


def claim(session: Session, parts: Parts, provenance: Mapping[str, Any]) -> Claim:
    """Make the run directory, or open the one that this session continues.

    After torchrun has restarted its processes, they continue in the directory that its first processes made.
    `provenance` has the entries of `meta.json` on what a new run begins with.

    Raises:
        ConfigError: The directory exists already or cannot be made, or a run cannot continue in it; raised on every
            rank.

    Collectives: one object broadcast, and one object all-gather unless `resume=` names the directory.
    """
    config, resumed = session.config, session.resumed
    accept, fallback = config.accept_changed_records, config.resume_fallback
    if resumed is not None:
        restarted = is_restart()
        notes = on_main(
            lambda: check_resumable(resumed, restarted=restarted, accept=accept, fallback=fallback),
            "checking the run directory",
        )
        return Claim(resumed, is_new=False, notes=notes)
    job = Job.of(gather(own_agent()))
    place = _place(config)

    def make() -> tuple[Path, bool]:
        begun = begun_by(job, place)
        if begun is not None:
            check_resumable(begun, restarted=True, accept=accept)
            return begun.path, False
        created = RunDir.create(
            place or default_run_dir(config.experiment, job),
            config_yaml=session.frozen,
            overrides=session.overrides,
            meta={
                "experiment": config.experiment,
                "torchrun_agents": job.agents if job else [],
                **_facts(parts, provenance),
            },
        )
        return created.path, True

    path, is_new = on_main(make, "claiming the run directory")
    return Claim(RunDir.open(path, key="run_dir"), is_new)


@contextmanager
def in_use(run_dir: RunDir, timeout_s: float) -> Iterator[bool]:
    """Hold the lock of the run directory, on rank 0; yield whether the file system has locks.

    Raises:
        ConfigError: As for `RunDir.in_use`; raised on every rank.

    Collectives: one object broadcast.
    """
    patience_s = min(PATIENCE_S, timeout_s / 2)  # less than the other ranks wait for rank 0
    with ExitStack() as stack:
        yield on_main(lambda: stack.enter_context(run_dir.in_use(patience_s)), "locking the run directory")


def describe(run_dir: RunDir, parts: Parts, provenance: Mapping[str, Any]) -> None:
    """Add facts of the built run to `meta.json`, if a sweep has made the directory before or its source changed.

    Arguments as for `claim`.

    Collectives: one object all-gather.
    """
    with agreeing("describing the run"):
        if not parts.processes.is_main:
            return
        if "primary_metric" not in run_dir.meta:
            run_dir.update_meta(**_facts(parts, provenance))
        elif any(run_dir.meta.get(key) != facts for key, facts in provenance.items()):
            run_dir.update_meta(**provenance)


def record(session: Session, claimed: Claim, parts: Parts, start: Start) -> Sequence[str]:
    """Record this session in `meta.json`, if it continues a run; return notes for the user.

    A run without a checkpoint of its own begins again; the records of its first attempt are renamed.

    Collectives: one object all-gather.
    """
    run_dir = claimed.run_dir
    with agreeing("recording the session"):
        if not parts.processes.is_main or claimed.is_new:
            return []
        facts = all_metric_facts(run_dir.meta, parts.evaluation)
        run_dir.record_session(session.frozen, overrides=session.overrides, facts=facts)
        begins = start.step == 0 or start.forked
        aside = set_aside(run_dir.metrics_path) if begins else None
        if begins:
            set_aside(run_dir.path / PAIRS)
    return [f"no checkpoint: begins again; the earlier records are in {aside.name}"] if aside else []


def opening_notes(
    session: Session, parts: Parts, run_dir: RunDir, start: Start, origin: Sequence[str], has_locks: bool
) -> list[str]:
    """Return the notes and warnings to print before the first step.

    `origin` has those on what the run begins with or continues from; what follows from that is printed after it.
    """
    notes = [f"run directory: {run_dir.path}"]
    if start.step and not start.forked:
        notes.append(f"continues from step {start.step}")
    notes += [*origin, *start.notes]
    if parts.network.loads_weights:
        name = type(parts.network.module).__name__
        notes.append(
            f"model: the constructor of {name} loads weights, so every rank builds all of it and init_weights() is not"
            " called; with init_from=SOURCE each rank reads its own part"
        )
    notes += _unsharded(session.config.sharding, parts.processes.world_size)
    wanted, split = session.config.trainer.eval_samples, len(parts.splits.eval)
    if wanted != AUTO and int(wanted) > split:
        part = part_of_the_data(split, split, session.config.data)
        notes.append(f"trainer.eval_samples: evaluates on {part}; {wanted} are more than there are")
    unfit = unfit_statistics(parts.network.module, session.config.ema.batchnorm_batches, session.averages)
    schedule = warmup_warnings(session.config.schedule, session.config.trainer.steps)
    notes += [
        f"warning: {warning}" for warning in (*parts.splits.warnings, *schedule, *parts.pitfalls, *unfit)
    ]
    if not has_locks:
        notes.append(
            f"warning: {run_dir.path}: this file system has no locks; do not start a second run in it"
        )
    return notes


def _unsharded(sharding: ShardingConfig, world_size: int) -> list[str]:
    """Return a note if each process has the whole model with a built-in strategy that shards models."""
    if sharding._target_ is not None or not sharding.shards:
        return []
    if world_size == 1:
        why = "this run has one process; torchrun or, in a sweep, launch.processes_per_node starts several"
    elif sharding.strategy == "hsdp" and sharding.replicate == world_size:
        why = f"each of the {world_size} processes is a replica (sharding.replicate={world_size})"
    else:
        return []
    return [f"sharding={sharding.strategy}: nothing is sharded, because {why}"]


@contextmanager
def watching(
    session: Session,
    claimed: Claim,
    parts: Parts,
    run: Run,
    covered: Mapping[str, Covered],
) -> Iterator[Watchers]:
    """Start the loggers and the display of a run, and close them at the end.

    Raises:
        ConfigError: A logger does not start; raised on every rank. After a ConfigError before the first step is done, a
            new run directory is removed.

    Collectives: one object all-gather.
    """
    loggers = Loggers([])
    try:
        with agreeing("starting the loggers"):
            if parts.processes.is_main:
                loggers = make_loggers(
                    session.config.logger,
                    run_dir=claimed.run_dir.path,
                    run_id=claimed.run_dir.meta["wandb_run_id"],
                    run_config=plain_config(session.config),
                    resumed_at=None if claimed.is_new else run.step,
                    covered={} if session.config.accept_changed_records else covered,
                    allowed=session.allowed,
                )
    except ConfigError:
        if parts.processes.is_main and claimed.is_new:
            shutil.rmtree(claimed.run_dir.path)
        raise
    summary: dict[str, float | str] = {}
    code, is_reported, never_began, first = EXIT_FAILED, False, False, run.step
    try:
        with _display(parts, run) as display:
            yield Watchers(loggers, display, summary)
        code, is_reported = run.exit_code, run.finished
    except ConfigError:
        never_began = claimed.is_new and run.step == first
        raise
    finally:
        loggers.close(summary, code)
        if never_began and parts.processes.is_main:
            shutil.rmtree(claimed.run_dir.path)
        elif not is_reported and loggers.sync_command:  # a finished run prints the command with its result
            print(f"wandb is offline; upload with: {loggers.sync_command}")


def _display(parts: Parts, run: Run) -> AbstractContextManager[Progress | NullProgress]:
    if not parts.processes.is_main:
        return nullcontext(NullProgress())
    metric = parts.task.primary_metric
    return Progress(
        run.config.steps,
        start_step=run.step,
        metric=metric,
        higher_is_better=is_higher_better(metric, parts.task, parts.evaluation.metrics),
    )


def _facts(parts: Parts, provenance: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **provenance,
        "world_size": parts.processes.world_size,
        "nodes": launched_nodes(),
        **metric_facts(parts.evaluation),
    }
