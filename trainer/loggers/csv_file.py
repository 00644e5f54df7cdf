"""Write `metrics.csv`: one row per logged step, one column per metric, for spreadsheets."""

import csv
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from trainer.loggers.jsonl import RecordsOnly
from trainer.rundir.directory import METRICS
from trainer.rundir.files import open_own, open_regular, write_atomically
from trainer.rundir.keys import STEP
from trainer.rundir.records import records_of

FILE = "metrics.csv"


class CsvLogger(RecordsOnly):
    """Logger that appends one row per record.

    A cell is empty if the metric was not logged, and `nan` if it was not finite. A record with new metrics adds columns
    at the right end; then the whole file is replaced, so a reader always finds one header.
    """

    def __init__(self, *, run_dir: Path) -> None:
        """Write the records of earlier sessions again from `metrics.jsonl`, which has no record twice."""
        self._path = run_dir / FILE
        self._columns: list[str] = [STEP]
        records = list(records_of(run_dir / METRICS))
        for record in records:
            self._columns += [key for key in record if key not in self._columns]
        self._replace([self._row(record) for record in records])

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a row; first add a column for each new metric."""
        record = {**metrics, STEP: step}
        new = [key for key in record if key not in self._columns]
        if new:
            with open_regular(self._path) as file:
                _, *rows = csv.reader(io.TextIOWrapper(file, encoding="utf-8", newline=""))
            self._columns += new
            self._replace([row + [""] * len(new) for row in rows])
        # Opened for each row, because a reader of the file may have replaced it, as editors do.
        with os.fdopen(open_own(self._path, os.O_WRONLY | os.O_APPEND), "w", encoding="utf-8") as file:
            file.write(_lines([self._row(record)]))

    def close(self, summary: Mapping[str, float | str], exit_code: int) -> None:
        """Do nothing, because no file is open."""

    def _replace(self, rows: Iterable[Sequence[str]]) -> None:
        write_atomically(self._path, _lines([self._columns, *rows]), make_folder=False)

    def _row(self, record: Mapping[str, float]) -> list[str]:
        cells = [_cell(record[key]) if key in record else "" for key in self._columns[1:]]
        return [str(int(record[STEP])), *cells]


def _cell(value: float) -> str:
    number = float(value)  # as it is in the records, so that rows of all sessions are alike
    return str(number) if math.isfinite(number) else "nan"


def _lines(rows: Iterable[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
