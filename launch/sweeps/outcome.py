"""Printed result of a sweep: a line for each job, the comparison of finished runs, and the next commands."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from launch.comparing.files import write_comparison
from launch.comparing.tables import summary_tables
from launch.sweeps.attempt import now
from launch.sweeps.backends.base import Backend
from launch.sweeps.directory import STATES, Job, Sweep, failure
from launch.sweeps.more_seeds import more_seeds
from trainer.config.own_code import EXPORTED
from trainer.config.trust_note import trust_note
from trainer.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED
from trainer.report.comparison import combine_all
from trainer.report.first_screen import best_of_all, commands_of
from trainer.report.runs import read_run
from trainer.report.text.terminal import print_tables
from trainer.shell.commands import command, command_lines, path_argument, shell_quoted
from trainer.shell.printable import print_text


def counts(jobs: Sequence[Job]) -> str:
    """Return the number of jobs in each state as text, such as `12 runs: 9 done, 3 failed`."""
    numbers = {state: sum(job.shown_state == state for job in jobs) for state in STATES}
    by_state = ", ".join(f"{number} {state}" for state, number in numbers.items() if number)
    return f"{len(jobs)} run{'s'[: len(jobs) != 1]}: {by_state}"


def job_lines(sweep: Sweep) -> list[str]:
    """Return one aligned line per job: state, name, steps, attempts, duration and error."""
    width = max(len(job.run_dir) for job in sweep.jobs)
    step_width = max(len(f"{job.step}/{job.steps}") for job in sweep.jobs)
    return [
        f"{job.shown_state:<7}  {job.run_dir:<{width}}  step {f'{job.step}/{job.steps}':>{step_width}}"
        f"  {job.attempts} attempt{'s'[: job.attempts != 1]:<1}  {_duration(job):>8}"
        + (f"  {job.error}" if job.error else "")
        for job in sweep.jobs
    ]


def _duration(job: Job) -> str:
    """Return the duration of the last attempt as hours, minutes and seconds."""
    if job.started is None:
        return "-"
    try:
        took = datetime.fromisoformat(job.ended or now()) - datetime.fromisoformat(job.started)
    except (ValueError, TypeError):
        return "?"  # a damaged time, or one without a zone; the line is still useful without it
    seconds = took.total_seconds()
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"


def print_result(sweep: Sweep, allowed: Sequence[str] = ()) -> tuple[list[str], str]:
    """Print the comparison of the runs that are done, and write it into `report/` of the sweep.

    Returns:
        The commands of the page: the export of the best weights, and more seeds if these are lacking. And a note for
        their title if an exported run has code of its own that is not allowed.
    """
    done = [read_run(sweep.run_dir(job)) for job in sweep.jobs if job.state == "done"]
    if not done:
        return [], ""
    comparisons = combine_all(done)
    print_tables(summary_tables(done, comparisons))
    seeds = more_seeds(sweep, comparisons[0][0]) if len(comparisons) == 1 else None
    commands = [commands_of(by_metric[0], allowed, seeds) for by_metric in comparisons]
    print(f"report: {write_comparison(sweep.path / 'report', done, comparisons, commands)}")
    best = (best_of_all(by_metric[0]) for by_metric in comparisons)
    notes = (trust_note(one.run.config, EXPORTED, allowed) for one in best if one is not None)
    return [line for pairs in commands for _, line in pairs], next(filter(None, notes), "")


def conclude(sweep: Sweep, backend: Backend, *, stopped: bool, allowed: Sequence[str]) -> int:
    """Update and save all states, print the result and the next commands, and return the exit code.

    This process holds the lock of the sweep. `stopped` is the result of the backend that started the runs.
    """
    held = backend.held(sweep)
    sweep.observe(held)
    sweep.save_if_possible()
    best, note = ([], "") if held or stopped else print_result(sweep, allowed)
    failed = [job for job in sweep.jobs if job.state == "failed"]
    print(counts(sweep.jobs))
    for job in failed:
        print_text(f"  failed {failure(sweep, job)}")
    missing = sweep.missing(held)
    commands = [sweep.retry_command(allowed)] if missing else best
    if held:
        commands.append(command("status", path_argument(sweep.path)))
    if any(job.state == "done" for job in sweep.jobs):
        commands.append(command("compare", path_argument(sweep.path)))
        if offline := _wandb_sync(sweep.path):
            commands.append(offline)
    if commands:
        title = (
            "stopped; continue with:"
            if stopped and missing
            else f"Next{note if best and not missing else ''}:"
        )
        print(*command_lines(title, commands), sep="\n")
    if stopped and missing:
        return EXIT_STOPPED
    # All remaining runs count as failed here, also those that left no record of a failure.
    return EXIT_FAILED if missing else EXIT_DONE


def _wandb_sync(path: Path) -> str | None:
    """Return the shell command that uploads the offline logs of wandb, or None if there are none."""
    if next(path.glob("*/wandb/offline-run-*"), None) is None:
        return None
    return f"wandb sync {shell_quoted([path_argument(path)])}/*/wandb/offline-run-*"
