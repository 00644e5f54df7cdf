"""The command that adds the seeds which a sweep lacks to the same sweep."""

import math
import os

from launch.sweeps.directory import Sweep
from trainer.report.answers import SPREAD_SEEDS
from trainer.report.comparison import Comparison
from trainer.report.pairs import needed
from trainer.report.runs import whole_number
from trainer.report.statistics import ALPHA
from trainer.rundir.keys import LIVE
from trainer.shell.commands import command, composition_flags, hydra_quoted, path_argument
from trainer.shell.stored import may_be_printed

MOST = 10
"""Most further seeds that a command adds; a question that takes more is not settled by seeds alone."""


def more_seeds(sweep: Sweep, comparison: Comparison) -> str | None:
    """Return the command that adds the lacking seeds of every setting to the sweep, by the primary metric's comparison.

    The result is None if no seeds are lacking or too many are, if the runs are not all combinations of some values, if
    the sweep belongs to another working directory, or if its record has words that only the user may type.
    """
    count = lacking(comparison)
    values = _values(sweep)
    if not count or values is None or os.path.realpath(sweep.cwd) != os.path.realpath(os.getcwd()):
        return None
    used = [*values.pop("seed", []), *(seed for group in comparison.groups for seed in group.seeds)]
    first = 1 + max((whole_number(seed) or 0 for seed in used), default=0)
    launch = [word for word in sweep.argv[1:] if word.lstrip("+~").startswith(("launch=", "launch."))]
    typed = [key if key.startswith("~") else f"{key}={','.join(own)}" for key, own in values.items()]
    words = [*composition_flags(sweep.argv), *typed, *launch]
    if not may_be_printed(words):
        return None
    seeds = ",".join(map(str, range(first, first + count)))
    place = f"sweep_dir={hydra_quoted(path_argument(sweep.path))}"
    return command("sweep", "-m", *words, f"seed={seeds}", place)


def lacking(comparison: Comparison) -> int:
    """Return how many further seeds settle the first open question that at most MOST of them settle; 0 for none.

    It is 0 for forks too: with another seed they share the steps of the same run.
    """
    if any(group.has_forks for group in comparison.groups):
        return 0
    if comparison.answers:
        *questions, further = comparison.answers
        open_ones = [further.more_seeds, *(answer.more_seeds for answer in questions)]
    else:
        open_ones = _of_one_setting(comparison)
    return next((math.ceil(more) for more in open_ones if 0 < more <= MOST), 0)


def _of_one_setting(comparison: Comparison) -> list[float]:
    """Return how many further seeds show that the best average of a single setting beats the live weights."""
    higher = comparison.higher_is_better
    averages = [row for row in comparison.rows[0] if row.weights != LIVE and row.is_eligible]
    if higher is None or not averages or (comparison.winner is not None and comparison.winner.seeds > 1):
        return []
    best = (max if higher else min)(averages, key=lambda row: row.last.value)
    if best.last.gap is None or best.seeds < 2:
        return [SPREAD_SEEDS]
    return [max(1.0, needed(best.last.gap, ALPHA / len(averages), best.seeds) - best.seeds)]


def _values(sweep: Sweep) -> dict[str, list[str]] | None:
    """Return the values of each key of the jobs, without repetition; None unless the jobs are all combinations of them.

    Seeds may be missing: a sweep can grow by seeds of one setting.
    """
    settings = [dict(override.partition("=")[::2] for override in job.overrides) for job in sweep.jobs]
    keys = list(settings[0])
    if any(own.keys() - {"seed"} != settings[0].keys() - {"seed"} for own in settings):
        return None
    values = {key: list(dict.fromkeys(own[key] for own in settings if key in own)) for key in keys}
    combinations = {tuple(value for key, value in own.items() if key != "seed") for own in settings}
    count = math.prod(len(own) for key, own in values.items() if key != "seed")
    return values if len(combinations) == count else None
