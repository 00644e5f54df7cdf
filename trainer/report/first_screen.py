"""Answer the question of a run or of a comparison: the best weights, by how much, how sure, and how to get them."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isinf
from pathlib import Path

from trainer.report.comparison import Comparison
from trainer.report.format import display_name, format_interval, format_mean, format_p
from trainer.report.group import Group
from trainer.report.verdicts import Row
from trainer.rundir.keys import AVERAGE, LIVE
from trainer.shell.commands import command, path_argument, trust


@dataclass(frozen=True)
class Best:
    """The weights with the best value at the last evaluation, of all groups of a comparison."""

    group: Group
    row: Row
    rows: list[Row]
    """All rows of the group."""
    run_dir: Path
    """The run of the group in which these weights have their best value."""
    weights: str
    """Name of the weights in that run, as commands take it: `live` or `ema/NAME`."""


@dataclass(frozen=True)
class FirstScreen:
    """What the first screen of a page shows beside a picture."""

    headline: str
    """One sentence a line."""
    facts: list[tuple[str, str]]
    """Pairs of a term and its figure."""
    command_title: str
    command: str
    """Command that exports the best weights; empty if nothing can be ranked."""


def best_of_all(comparison: Comparison) -> Best | None:
    """Return the best weights of a comparison; None without a direction or without a finite value."""
    higher = comparison.higher_is_better
    if higher is None:
        return None
    better = max if higher else min
    index = comparison.ranked()[0]
    group, rows = comparison.groups[index], comparison.rows[index]
    eligible = [row for row in rows if row.is_eligible]
    if not eligible:
        return None
    row = comparison.winner or better(eligible, key=lambda row: row.last.value)
    values = {
        (path, name): float(run.evaluation(name, comparison.metric).values[-1])
        for run in group.runs
        for path, name in group.sources(row.weights)
        if path == run.path
    }
    run_dir, name = better(values, key=values.__getitem__)
    return Best(group, row, rows, run_dir, LIVE if name == LIVE else f"{AVERAGE}{name}")


def export_command(run_dir: Path, weights: str, allowed: Sequence[str] = ()) -> str:
    """Return the command that exports weights of a run.

    Args:
        run_dir: The run directory.
        weights: `live` or `ema/NAME`.
        allowed: Prefixes of `_target_` that the user allowed.
    """
    out = path_argument(Path(f"{run_dir.name}.safetensors"))
    return command("export", path_argument(run_dir), f"weights={weights}", f"out={out}", *trust(allowed))


def first_screen(comparison: Comparison, allowed: Sequence[str] = ()) -> FirstScreen:
    """Answer by one metric.

    Args:
        comparison: Comparison by the metric, also of a single run.
        allowed: Prefixes of `_target_` that the user allowed, for the command.
    """
    best = best_of_all(comparison)
    headline = "\n".join(map(str, comparison.answers)) or comparison.headline
    if best is None:
        return FirstScreen(headline, [], "", "")
    title = "Export the winner" if comparison.winner is not None else "Export the best so far"
    return FirstScreen(
        headline,
        _facts(comparison, best),
        title,
        export_command(best.run_dir, best.weights, allowed),
    )


def _facts(comparison: Comparison, best: Best) -> list[tuple[str, str]]:
    group, row = best.group, best.row
    averages = [own for own in best.rows if own.weights != LIVE and own.is_eligible]
    better = max if comparison.higher_is_better else min
    compared = row if row.weights != LIVE else better(averages, key=lambda own: own.last.value, default=None)
    place = f" of {group.short_name}" if len(comparison.groups) > 1 else ""
    facts = [(f"{display_name(row.weights)}{place}", format_mean(row.last))]
    if compared is not row and compared is not None:
        facts.append((display_name(compared.weights), format_mean(compared.last)))
    facts += [(LIVE, format_mean(own.last)) for own in best.rows if own.weights == LIVE and own is not row]
    if compared is not None and compared.last.gap is not None:
        gap = f"{format_interval(compared.last.gap)}, p {format_p(compared.last.p)}"
        facts.append((f"live - {display_name(compared.weights)} [95 % CI]", gap))
    samples = row.further_samples or group.runs[0].eval_samples(comparison.metric)
    count = "not recorded" if isinf(samples) else f"{samples:,.0f}, the same for all weights"
    facts.append(("evaluation samples", count))
    seeds = f"{row.seeds}" + (
        f" ({comparison.runs} runs, {len(comparison.groups)} settings)" if place else ""
    )
    return [*facts, ("seeds", seeds), ("step", str(row.last_step))]
