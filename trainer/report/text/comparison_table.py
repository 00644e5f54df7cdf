"""Tables of a comparison: all weights of all groups, and the settings in which the groups differ."""

import math
from collections.abc import Sequence
from operator import attrgetter

from trainer.report.comparison import Comparison
from trainer.report.group import Group
from trainer.report.naming import ABSENT
from trainer.report.text.table import (
    Line,
    Table,
    file_only_columns,
    named_with_decay,
    row_cells,
    row_headers,
    row_notes,
)
from trainer.report.verdicts import Row


def combined_table(comparison: Comparison, max_lines: float = math.inf) -> Table:
    """Make the table of a comparison, the groups in their own order.

    Args:
        comparison: Comparison to show.
        max_lines: Most lines; if there are more, only the best groups are shown, with a note. Infinity shows all.
    """
    shown = comparison.best_within(max_lines)
    rows = [row for index in shown for row in comparison.rows[index]]
    setting_names = list(comparison.groups[0].short_settings)
    # A count that is equal on all lines is in the title instead of a column.
    columns = {"seeds": "seeds", "last step": "last_step"}
    counts = {name: key for name, key in columns.items() if len(set(map(attrgetter(key), rows))) > 1}
    metric = comparison.groups[0].with_unit(comparison.metric)
    value_header = f"last {metric}" if "last step" in counts else f"{metric} at step {rows[0].last_step}"
    headers = [*setting_names, "weights", *counts, *row_headers(value_header, rows)]
    several = any(row.seeds > 1 for row in rows)
    notes = row_notes(rows, comparison.higher_is_better, disagree=comparison.disagree)
    if len(shown) < len(comparison.groups):
        text = f"The best {len(shown)} of {len(comparison.groups)} groups; table.csv and the page have all."
        notes.insert(0, text)
    if setting_names:
        notes.append("Runs that differ only in their seed or their averages are one group.")
        notes += _more_settings(comparison)
        notes.append("p here is within a group; the answers above also adjust for the choice of the group.")
    return Table(
        title=f"{comparison.runs} runs{'' if 'seeds' in counts else _seeds_text(rows[0].seeds, setting_names)}"
        f": {comparison.metric}",
        headers=headers,
        lines=[
            _line(row, comparison.groups[index], list(counts.values()), several, row is comparison.winner)
            for index in shown
            for row in comparison.rows[index]
        ],
        headline="\n".join(map(str, comparison.answers)) or comparison.headline,
        notes=notes + comparison.notes,
        file_only_columns=file_only_columns(rows, len(headers)),
        group_columns=len(setting_names),
        metric=comparison.metric,
    )


def _seeds_text(seeds: int, setting_names: Sequence[str]) -> str:
    return f", {seeds} seed{'s'[: seeds != 1]}{' each' * bool(setting_names)}"


def _line(row: Row, group: Group, counts: Sequence[str], several: bool, is_winner: bool) -> Line:
    cells, keys = row_cells(row, several=several)
    if row.last.winner and group.short_settings:
        cells[3] = "wins here"
    settings = list(group.short_settings.values())
    numbers = [getattr(row, name) for name in counts]
    return Line(
        [*settings, named_with_decay(group, row), *map(str, numbers), *cells],
        [*map(_number_or_text, settings), row.weights, *numbers, *keys],
        marked=is_winner,
    )


def _more_settings(comparison: Comparison) -> list[str]:
    """Return a note on how many settings differ that the names of the groups leave out; [] if none do."""
    if not any(group.name_is_partial for group in comparison.groups):
        return []
    more = len(comparison.settings()) - len(comparison.groups[0].short_settings.keys() - {"run"})
    if more < 1:
        return []
    plural = "s differ" if more > 1 else " differs"
    return [f"And {more} more setting{plural} between the groups: in runs.csv, and at the end of the page."]


def _number_or_text(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def settings_table(comparison: Comparison) -> Table | None:
    """Make the table of all settings in which the groups differ; None if the group names contain them all."""
    keys = comparison.settings()
    if not keys or not any(group.name_is_partial for group in comparison.groups):
        return None
    rows = [
        [group.name, *(group.runs[0].value_of(key) or ABSENT for key in keys)] for group in comparison.groups
    ]
    return Table("What differs between the runs", ["runs", *keys], [Line(row, [*row]) for row in rows])
