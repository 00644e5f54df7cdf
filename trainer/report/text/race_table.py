"""Make the table of the races of a run: on how many samples each average was evaluated at each step."""

from trainer.report.format import EMPTY_CELL, display_name
from trainer.report.races import races_of
from trainer.report.runs import Run
from trainer.report.text.table import Line, Table


def race_table(run: Run, metric: str) -> Table | None:
    """Make the table of all races, which `metric` decides, a line for each; None without a race."""
    races = races_of(run, metric)
    if not races:
        return None
    names = list(dict.fromkeys(name for race in races for name in race.samples))
    lines = []
    for race in races:
        counts = [race.samples.get(name) for name in names]
        cells = [
            EMPTY_CELL
            if count is None
            else f"out after {count:,}"
            if name in race.eliminated
            else f"all {count:,}"
            for name, count in zip(names, counts, strict=True)
        ]
        lines.append(Line([str(race.step), *cells], [race.step, *counts]))
    return Table(
        title=f"{run.name}: races by {metric}",
        headers=["step", *map(display_name, names)],
        lines=lines,
        notes=[
            "Samples of each average. One that is clearly not the best on a part of them is out, and has no value at"
            " that step in tables and pictures."
        ],
        metric=metric,
    )
