"""Write `metrics.jsonl`: one JSON object per logged step, the input of every report and comparison."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.rundir.continuing import Covered, digest_of
from trainer.rundir.files import open_own, open_regular, sync_directory
from trainer.rundir.keys import STEP
from trainer.rundir.same_place import SamePlace

if TYPE_CHECKING:
    from trainer.protocols import Cell


class JsonlLogger:
    """Logger that appends one line per record and flushes it: a killed run loses at most its last line.

    JSON has no NaN and no infinity. Such a value is written as `null` under its key. So a reader can distinguish a
    diverged loss from a loss that was not logged.
    """

    def __init__(self, path: Path, /) -> None:
        # `path` is positional only, so that the `logger.args` of a checkpoint cannot set it.
        self._path = path
        self._file = os.fdopen(open_own(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab")
        with open_regular(path) as written:
            self._length, self._digest = digest_of(written)
        self._place = SamePlace(path.parent, path)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write `metrics` as one line that begins with the step.

        Raises:
            NotSaved: The file or its run directory was moved or deleted.
        """
        self._place.check()
        record: dict[str, float | None] = {STEP: step}
        record |= {key: _finite_or_none(value) for key, value in metrics.items() if key != STEP}
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
        """Do nothing, because the file is in the run directory already."""

    def table(self, step: int, name: str, headers: Sequence[str], rows: "Sequence[Sequence[Cell]]") -> None:
        """Do nothing, because tables are made from the records."""

    def close(self, summary: Mapping[str, float | str], exit_code: int) -> None:
        """Close the file without a summary, which can be computed from its records."""
        self._file.close()


def _finite_or_none(value: float) -> float | None:
    number = value if isinstance(value, int) else float(value)
    return number if math.isfinite(number) else None
