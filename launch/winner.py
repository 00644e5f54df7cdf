"""The best run of a sweep and the best weights of a run, by the verdict of `launch.compare`. Imports no torch."""

from collections.abc import Sequence
from pathlib import Path

from trainer.distributed.torchrun import launched_rank
from trainer.errors import ConfigError
from trainer.rundir.directory import META
from trainer.rundir.keys import BEST
from trainer.shell.printable import print_text

SWEEP = "sweep.json"


def settled(folder: Path, weights: Sequence[str], step: str | int = "last") -> tuple[Path, list[str]]:
    """Return a run directory and names of weights; print the verdict if it decides one of them.

    If `folder` is the directory of a sweep, the run with the best weights is chosen. `best` among the weights becomes
    the winner or, without a winner, the weights with the best last evaluation; with `step=best` too it stays, because
    the best evaluation of the run decides both (`trainer.weights.selection.choose_checkpoint`).

    Raises:
        ConfigError: No run of the sweep was evaluated, or the runs cannot be ranked.
    """
    is_sweep = (folder / SWEEP).is_file() and not (folder / META).is_file()
    names_best = BEST in weights and step != BEST
    if not (is_sweep or names_best):
        return folder, list(weights)
    run, best, headline, notes = _best_of(folder)
    chosen = f"{run}: {best}" if names_best else str(run)
    if launched_rank() == 0:
        print_text("\n".join([f"chosen: {chosen} ({headline})", *notes]))
    return run, [best if names_best and name == BEST else name for name in weights]


def _best_of(folder: Path) -> tuple[Path, str, str, list[str]]:
    """Return the run and the weights with the best last evaluation by the primary metric, headline and notes."""
    # numpy, which the tables need, is imported only here.
    from trainer.report.comparison import combine_all
    from trainer.report.first_screen import best_of_all
    from trainer.report.runs import find_runs, read_runs

    comparisons = combine_all(read_runs(find_runs(folder)))
    if len(comparisons) != 1:
        what = (
            "have different tasks, data, evaluation samples or metrics"
            if comparisons
            else "were not evaluated yet"
        )
        raise ConfigError(f"{folder}: its runs {what}; expected runs that can be ranked, or name one run")
    found = comparisons[0][0]
    if found.higher_is_better is None:
        raise ConfigError(
            f"{folder}: meta.json does not declare whether a higher {found.metric} is better; name a run and weights"
        )
    best = best_of_all(found)
    if best is None:
        raise ConfigError(f"{folder}: no value of {found.metric} is finite; name a run and weights")
    return best.run.path, best.weights, found.headline, found.notes
