"""Answer the question of a run or of a comparison: the best weights, by how much, how sure, and how to get them."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isinf
from pathlib import Path

from trainer.config.own_code import EXPORTED, needed
from trainer.config.trust_note import trust_note
from trainer.report.comparison import Comparison
from trainer.report.earlier import Earlier
from trainer.report.format import display_name, format_interval, format_mean, format_test, holm_text
from trainer.report.group import Group
from trainer.report.runs import Run
from trainer.report.verdicts import Row
from trainer.rundir.keys import AVERAGE, LIVE
from trainer.shell.commands import command, path_argument, trust

Commands = list[tuple[str, str]]
"""Pairs of a title and a command: the export of the best weights, and more seeds for a sweep that lacks them; empty if
nothing can be ranked."""
WITH_FROM_PRETRAINED = ("transformers.", "diffusers.")
"""Beginnings of the `_target_` of models that an export writes as a folder for `from_pretrained`."""


@dataclass(frozen=True)
class Best:
    """The weights with the best value at the last evaluation, of all groups of a comparison."""

    group: Group
    row: Row
    rows: list[Row]
    """All rows of the group."""
    run: Run
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
    commands: Commands


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
        (n, name): float(evaluated[-1])
        for n, run in enumerate(group.runs)
        for path, name in group.sources(row.weights)
        if path == run.path and len(evaluated := run.evaluation(name, comparison.metric).values)
    }
    index, name = better(values, key=values.__getitem__)
    return Best(group, row, rows, group.runs[index], LIVE if name == LIVE else f"{AVERAGE}{name}")


def export_command(best: Best, allowed: Sequence[str] = (), earlier: Earlier | None = None) -> str:
    """Return the command that exports the best weights, or those of an earlier step of the run.

    It makes a file, or for a model of a library with `from_pretrained` the folder that this loads. Its
    `allow_targets` has the entries that the user allowed, without those that only other parts need.
    """
    target = best.run.settings.get("model._target_", "")
    suffix = "/" if target.startswith(WITH_FROM_PRETRAINED) else ".safetensors"
    path = best.run.path
    out = path_argument(Path(path.name)) + suffix
    entries = needed(best.run.config, allowed, EXPORTED)
    words = [f"weights={best.weights}", f"out={out}"]
    if earlier is not None:
        words = [f"weights={earlier.weights}", f"step={earlier.step}", f"out={out}"]
    return command("export", path_argument(path), *words, *trust(entries))


def commands_of(
    comparison: Comparison, allowed: Sequence[str] = (), more_seeds: str | None = None
) -> Commands:
    """Return pairs of a title and a command: the export of the best weights, and more seeds before it if none won.

    Weights of an earlier step that are clearly better take the place of those of the last one.

    Args:
        comparison: Comparison by the primary metric.
        allowed: Prefixes of `_target_` that the user allowed.
        more_seeds: Command that adds seeds to a sweep; None if none are lacking.
    """
    best = best_of_all(comparison)
    if best is None:
        return []
    won = comparison.winner is not None
    title = "Export the winner" if won else "Export the best so far"
    earlier = comparison.earlier if comparison.earlier is not None and comparison.earlier.is_kept else None
    if earlier is not None:
        title = f"Export the best of all evaluations, at step {earlier.step}"
    title += trust_note(best.run.config, EXPORTED, allowed)
    export = title, export_command(best, allowed, earlier)
    seeds = [] if more_seeds is None else [("Add the seeds that the first open question lacks", more_seeds)]
    return [export, *seeds] if won else [*seeds, export]


def first_screen(comparison: Comparison, commands: Commands) -> FirstScreen:
    """Answer by the metric of a comparison, also of a single run, with the result of `commands_of` for it."""
    best = best_of_all(comparison)
    headline = "\n".join(map(str, comparison.answers)) or comparison.headline
    facts = [] if best is None else _facts(comparison, best)
    return FirstScreen(headline, facts, commands)


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
        # With several settings the answers have the p-value, adjusted for the choice of the setting.
        test = "" if place else f", {format_test(compared.last.p, holm_text(len(averages)))}"
        gap = f"{format_interval(compared.last.gap)}{test}"
        facts.append((f"live - {display_name(compared.weights)} [95 % CI]", gap))
    samples = row.further_samples or group.runs[0].eval_samples(comparison.metric)
    count = "not recorded" if isinf(samples) else f"{samples:,.0f}, the same for all weights"
    facts.append(("evaluation samples", count))
    settings = f" ({comparison.runs} runs, {len(comparison.groups)} settings)" if place else ""
    return [*facts, ("seeds", f"{row.seeds}{settings}"), ("step", str(row.last_step))]
