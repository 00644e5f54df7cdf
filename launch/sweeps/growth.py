"""More runs for a sweep that exists: those of a command line that are not in it yet."""

import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from omegaconf import OmegaConf

from launch.sweeps.backends.choose import check_change, make_backend
from launch.sweeps.config import LaunchConfig, check_launch
from launch.sweeps.directory import Job, Sweep, plan_jobs
from launch.sweeps.expand import Planned
from trainer.config.compose import to_config
from trainer.config.frozen import freeze_config, thaw
from trainer.errors import ConfigError
from trainer.rundir.circumstances import git_state
from trainer.rundir.directory import CONFIG
from trainer.rundir.files import read_text


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
    _refuse_what_was_forgotten(sweep, present, missing, groups[0])
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
    sweep: Sweep, present: Iterable[str], missing: Sequence[Planned], group: str
) -> None:
    """Refuse a run without a key that was typed for every job, unless its default is the value of a job.

    Args:
        sweep: Sweep to which the runs would be added.
        present: Configurations of its jobs as YAML.
        missing: Runs that would be added.
        group: Their wandb group.

    Raises:
        ConfigError: A run lacks such a key.
    """
    typed = [{_key(word): word for word in job.overrides} for job in sweep.jobs]
    everywhere = set.intersection(*map(set, typed))
    theirs = [OmegaConf.create(text) for text in present]
    for run in missing:
        absent = everywhere - set(map(_key, run.overrides))
        ours = OmegaConf.create(run.frozen(group))
        forgotten = [
            word
            for key, word in typed[-1].items()
            if key in absent
            and all(OmegaConf.select(ours, key) != OmegaConf.select(one, key) for one in theirs)
        ]
        if forgotten:
            raise ConfigError(
                f"{', '.join(map(_key, forgotten))}: expected here too, as typed for every run of {sweep.path}"
                f" (the last: {' '.join(forgotten)})"
            )


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]
