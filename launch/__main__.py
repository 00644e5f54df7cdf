"""`python -m launch`: start one run or, with `-m`, a sweep, on this machine or on a Slurm cluster.

Exit codes: 0 done (or submitted), 1 a run failed, 2 bad input, 75 stopped by a signal (continue with `launch.retry`).
"""

import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from pathlib import Path
from shutil import get_terminal_size

from ema.advice import pitfalls
from launch.cli import naming_files
from launch.sweeps.advice import one_run_instead
from launch.sweeps.backends.base import launcher, resuming
from launch.sweeps.backends.choose import make_backend
from launch.sweeps.backends.manifests import check_manifest, manifest
from launch.sweeps.directory import SWEEP, Sweep, default_sweep_dir, plan_jobs
from launch.sweeps.expand import Plan, expand
from launch.sweeps.growth import add_missing
from trainer.cli import run_command
from trainer.config.compose import is_multirun
from trainer.errors import EXIT_BAD_INPUT, EXIT_DONE, ConfigError
from trainer.shell.commands import command, composition_flags, hydra_quoted, path_argument, typed_form
from trainer.shell.printable import wrapped


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code; without arguments, print the help on standard error and return 2."""
    if all(map(is_multirun, argv)):
        with redirect_stdout(sys.stderr), suppress(SystemExit):
            expand(["--help"])
        return EXIT_BAD_INPUT
    return run_command(lambda: naming_files(lambda: _launch(argv)), argv)


def _launch(argv: Sequence[str]) -> int:
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise ConfigError(
            f"{command('sweep')}: expected no torchrun around this command, it starts torchrun itself"
        )
    plan = expand(argv)
    grows = plan.sweep_dir is not None and os.path.lexists(os.path.join(plan.sweep_dir, SWEEP))
    if grows and plan.launch.name == "print":
        retry = command("retry", path_argument(Path(str(plan.sweep_dir))), "launch=print")
        raise ConfigError(
            f"sweep_dir: {plan.sweep_dir} is a sweep, and its runs would be printed again; choose another directory,"
            f" or print its remaining runs by {retry}"
        )
    backend = make_backend(plan.launch)
    backend.check(plan.runs[0].config.trainer.device)
    bank = one_run_instead(plan.runs, plan.launch)
    if bank:
        print(
            f"note: one run with a bank of averages answers these {len(plan.runs)}: {bank}", file=sys.stderr
        )
    for warning, runs in _warnings(plan).items():
        count = f" [{len(runs)} of {len(plan.runs)} runs]" if len(plan.runs) > 1 else ""
        line = f"warning: {warning}{count}"
        print(wrapped(line, get_terminal_size().columns) if sys.stderr.isatty() else line, file=sys.stderr)
    if plan.launch.name == "print":
        _print_commands(plan)
        return EXIT_DONE
    sweep = Sweep.open(str(plan.sweep_dir)) if grows else Sweep.create(plan.sweep_dir, plan.runs, plan.launch)
    with sweep.driving():
        jobs = sweep.jobs
        if grows:
            # Read again under the lock, because another command may have written the record in the meantime.
            sweep = Sweep.open(sweep.path)
            jobs = add_missing(sweep, plan.runs, plan.launch)
        added = f", {len(jobs)} of them new" if grows else ""
        print(f"sweep: {sweep.path} ({len(sweep.jobs)} run{'s'[: len(sweep.jobs) != 1]}{added})", flush=True)
        allowed = sorted({target for run in plan.runs for target in run.allowed})
        stopped = backend.start(sweep, jobs, allowed) if jobs else False
        # Imported here because numpy, which the tables need, would delay --help and launch=print.
        from launch.sweeps.outcome import conclude

        return conclude(sweep, backend, stopped=stopped, allowed=allowed)


def _warnings(plan: Plan) -> dict[str, list[int]]:
    """Return each warning with the numbers of the runs that it concerns; the user's own rules are not called."""
    runs_of: dict[str, list[int]] = {}
    for number, run in enumerate(plan.runs):
        for warning in pitfalls(run.averages, run.config.trainer.steps):
            runs_of.setdefault(warning, []).append(number)
    return runs_of


def _print_commands(plan: Plan) -> None:
    """Print one command or manifest per run; no directory is made, because the user may never start these commands."""
    if plan.launch.format != "command":
        for run in plan.runs:
            check_manifest(plan.launch, run.config.trainer.device, plan.sweep_dir)
    path = plan.sweep_dir or default_sweep_dir(plan.runs[0].config.experiment)
    sweep_name = os.path.basename(os.path.abspath(path))
    for job, run in zip(plan_jobs(plan.runs), plan.runs, strict=True):
        grouped = [] if run.config.logger.group else [f"logger.group={hydra_quoted(sweep_name)}"]
        run_dir = os.path.join(path, job.run_dir)
        own = [*composition_flags(), *run.overrides, f"run_dir={hydra_quoted(run_dir)}", *grouped]
        if plan.launch.format != "command":
            name, again = f"{sweep_name}-{job.number}", resuming(run_dir, run.allowed)
            text = manifest(plan.launch, run.config.trainer.device, name, run_dir, own, again)
            print(f"---\n{text}", end="")
            continue
        print(typed_form([*launcher(plan.launch), "-m", "trainer", *own]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
