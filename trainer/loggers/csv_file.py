"""Write the records as a table, `run_dir/metrics.csv`, which a spreadsheet opens."""

import csv
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.rundir.directory import METRICS
from trainer.rundir.files import open_own, open_regular, write_atomically
from trainer.rundir.keys import STEP
from trainer.rundir.records import parse_record

if TYPE_CHECKING:
    from trainer.protocols import Cell

TABLE = "metrics.csv"


class CsvLogger:
    """Logger that keeps `metrics.csv`: a line per record of `metrics.jsonl`, a column per metric.

    A cell is empty where a record lacks the metric or its value was not finite. A record with a new metric adds a
    column: the whole file is then written again from `metrics.jsonl`, as it is at the start of each session.
    """

    def __init__(self, *, run_dir: Path) -> None:
        self._records, self._path = run_dir / METRICS, run_dir / TABLE
        self._columns: dict[str, None] = {STEP: None}
        self._write_again()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line, after `metrics.jsonl` has the record."""
        if any(key not in self._columns for key in metrics):
            self._write_again()
            return
        descriptor = open_own(self._path, os.O_WRONLY | os.O_APPEND)
        with os.fdopen(descriptor, "a", encoding="utf-8", newline="") as file:
            file.write(self._line({**metrics, STEP: step}))

    def _write_again(self) -> None:
        for record in self._read():
            self._columns |= dict.fromkeys(record)
        lines = [_as_csv(list(self._columns)), *map(self._line, self._read())]
        write_atomically(self._path, "".join(lines), make_folder=False)

    def _read(self) -> Iterator[dict[str, float]]:
        with open_regular(self._records) as file:
            for line in file:
                yield parse_record(line)[1]

    def _line(self, record: Mapping[str, float]) -> str:
        return _as_csv([_cell(key, record.get(key)) for key in self._columns])

    def image(self, step: int, name: str, path: str) -> None:
        """Do nothing, because the file is in the run directory already."""

    def table(self, step: int, name: str, headers: Sequence[str], rows: "Sequence[Sequence[Cell]]") -> None:
        """Do nothing, because tables are made from the records."""

    def close(self, summary: Mapping[str, float | str], exit_code: int) -> None:
        """Do nothing: every line was written at once."""


def _cell(key: str, value: float | None) -> str:
    if value is None or value - value != 0:  # missing, NaN or infinite
        return ""
    return str(int(value)) if key == STEP else repr(float(value))


def _as_csv(cells: Sequence[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()
