"""`metrics.jsonl`: one JSON object per logged step, the record that every report and comparison is made from."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.rundir.continuing import Covered, digest_of
from trainer.rundir.files import open_own, open_regular, sync_directory
from trainer.rundir.keys import STEP

if TYPE_CHECKING:
    from trainer.protocols import Cell


class JsonlLogger:
    """Appends one line per record and flushes it, so that a killed run loses at most the line it was writing.

    JSON has no NaN or infinity: such a value is written as `null` and its key stays, so that a diverged loss is
    told apart from one that was not logged.
    """

    def __init__(self, path: Path, /) -> None:
        # `path` is positional only: no `logger.args` of a checkpoint can choose the file.
        self._path = path
        self._file = os.fdopen(open_own(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab")
        with open_regular(path) as written:
            self._length, self._digest = digest_of(written)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write `metrics` with `train/step` first."""
        record: dict[str, float | None] = {STEP: step}
        record |= {key: _finite(value) for key, value in metrics.items() if key != STEP}
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        self._file.write(line)
        self._file.flush()
        self._length += len(line)
        self._digest.update(line)

    def sync(self) -> Covered:
        """Wait until all records are on disk, and return their length and digest for a checkpoint."""
        os.fsync(self._file.fileno())
        sync_directory(self._path.parent)
        return Covered(self._length, self._digest.hexdigest())

    def image(self, step: int, name: str, path: str) -> None:
        """Nothing to do: the file lies in the run directory already."""

    def table(self, step: int, name: str, headers: Sequence[str], rows: "Sequence[Sequence[Cell]]") -> None:
        """Nothing to do: tables are made from the records."""

    def close(self, summary: Mapping[str, float | str], exit_code: int) -> None:
        """Close the file; the summary can be computed from it at any time."""
        self._file.close()


def _finite(value: float) -> float | None:
    number = value if isinstance(value, int) else float(value)
    return number if math.isfinite(number) else None
