"""More runs for a sweep that exists: those of a command line that are not in it yet."""

import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import cache
from typing import Any

from launch.sweeps.advice import key_of
from launch.sweeps.backends.choose import check_change, make_backend
from launch.sweeps.config import LaunchConfig, check_launch
from launch.sweeps.directory import Job, Sweep, plan_jobs
from launch.sweeps.expand import Planned
from trainer.config.compose import clear_banks, to_config
from trainer.config.frozen import freeze_config, thaw
from trainer.config.schema import Config
from trainer.config.trust import is_within, leaves
from trainer.errors import ConfigError
from trainer.rundir.circumstances import git_state
from trainer.rundir.directory import CONFIG
from trainer.rundir.files import read_text
from trainer.shell.commands import shell_quoted
from trainer.shell.stored import may_be_printed


def add_missing(sweep: Sweep, runs: Sequence[Planned], launch: LaunchConfig) -> list[Job]:
    """Make the directories of the runs whose configuration no job of the sweep has, and list them in its record.

    The caller holds the sweep's lock. After an error the sweep is as it was; otherwise the new jobs are returned.

    Raises:
        ConfigError: The sweep belongs to another working directory, another backend has jobs of it, one of its runs
            cannot be read, or a key that was typed for all of them was not typed for a new run.
        OSError: The record cannot be written.
    """
    check_launch(launch)
    check_change(sweep, launch, make_backend(sweep.launch_config()).held(sweep))
    if os.path.realpath(sweep.cwd) != os.path.realpath(os.getcwd()):
        raise ConfigError(
            f"sweep_dir: {sweep.path} was started in {sweep.cwd}, to which relative paths refer; type this there"
        )
    sweep.require_directories(sweep.jobs)
    # Through the schema, so that a key of a later version has its default in the older text too.
    configs = [to_config(thaw(read_text(sweep.run_dir(job) / CONFIG))) for job in sweep.jobs]
    present = {freeze_config(config) for config in configs}
    # The folder may have another name now; its runs are in the group of the old one.
    groups = list(dict.fromkeys(config.logger.group or sweep.path.name for config in configs))
    missing = [run for run in runs if not any(run.frozen(group) in present for group in groups)]
    _refuse_what_was_forgotten(sweep, configs, missing, groups[0])
    jobs = plan_jobs(missing, sweep.jobs)
    git = git_state() if jobs else None
    before = sweep.jobs, sweep.launch, sweep.targets
    made = []
    try:
        for job, run in zip(jobs, missing, strict=True):
            run.make_directory(sweep.run_dir(job), groups[0], git)
            made.append(sweep.run_dir(job))
        sweep.jobs, sweep.launch = [*sweep.jobs, *jobs], asdict(launch)
        sweep.targets = sorted({*sweep.targets, *(target for run in missing for target in run.allowed)})
        sweep.save()
    except BaseException:
        sweep.jobs, sweep.launch, sweep.targets = before
        for run_dir in made:
            shutil.rmtree(run_dir, ignore_errors=True)
        raise
    return jobs


def _refuse_what_was_forgotten(
    sweep: Sweep, configs: Sequence[Config], missing: Sequence[Planned], group: str
) -> None:
    """Refuse a run without a key that was typed for every job, unless its default is the value of a job.

    A group is compared without the keys that were typed below it, for the run or for a job.

    Args:
        sweep: Sweep to which the runs would be added.
        configs: Configurations of its jobs.
        missing: Runs that would be added.
        group: Their wandb group.

    Raises:
        ConfigError: A run lacks such a key.
    """
    typed = [{key_of(word): word for word in job.overrides} for job in sweep.jobs]
    everywhere = set[str].intersection(*map(set, typed))
    set_by_jobs = {key for job in sweep.jobs for key in _set_by(job.overrides)}

    @cache
    def of_jobs(key: str, without: frozenset[str]) -> list[dict[str, Any]]:
        return [_values(config, key, without) for config in configs]

    def is_same(run: Planned, key: str) -> bool:
        if key == "allow_targets":  # which no frozen configuration has
            return all(is_within(target, run.allowed) for target in sweep.targets)
        below = frozenset(
            one for one in set_by_jobs | _set_by(run.overrides) if one != key and _is_at(one, key)
        )
        return _values(run.in_group(group), key, below) in of_jobs(key, below)

    for run in missing:
        absent = everywhere - _set_by(run.overrides)
        forgotten = {key: word for key, word in typed[-1].items() if key in absent and not is_same(run, key)}
        if forgotten:
            words = list(forgotten.values())
            last = f" (the last: {shell_quoted(words)})" if may_be_printed(words) else ""
            raise ConfigError(
                f"{', '.join(forgotten)}: expected here too, as typed for every run of {sweep.path}{last}"
            )


def _set_by(overrides: Sequence[str]) -> set[str]:
    """Return the keys that overrides set, also those of banks that a decay clears."""
    return set(map(key_of, clear_banks(overrides)))


def _values(config: Config, key: str, without: Iterable[str]) -> dict[str, Any]:
    """Return the values at and below a key of a configuration by their full keys, but not those at `without`."""
    top = key.partition(".")[0]
    return {
        path: value
        for path, value in leaves(top, asdict(config).get(top))
        if _is_at(path, key) and not any(_is_at(path, other) for other in without)
    }


def _is_at(path: str, key: str) -> bool:
    return path == key or path.startswith((f"{key}.", f"{key}["))
