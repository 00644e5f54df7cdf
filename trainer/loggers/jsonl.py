"""Write `metrics.jsonl`: one JSON object per logged step, the input of every report and comparison.

`pairs.jsonl` is written in the same way.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from trainer.errors import NotSaved
from trainer.protocols import Cell
from trainer.rundir.continuing import Covered, digest_of
from trainer.rundir.files import open_own, open_regular, sync_directory
from trainer.rundir.keys import STEP
from trainer.rundir.same_place import SamePlace


class RecordsOnly:
    """Base of loggers of records: pictures are in the run directory already, and tables are made from the records."""

    def image(self, step: int, name: str, path: str) -> None:
        """Do nothing."""

    def table(self, step: int, name: str, headers: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Do nothing."""


class JsonlLogger(RecordsOnly):
    """Logger that appends one line per record at once: a killed run loses at most its last line.

    Records that cannot be written, for example because the disk is full, are kept and written with the next ones. A
    checkpoint is saved only after all records (`sync`), so a resumed run never lacks one.

    JSON has no NaN and no infinity. Such a value is written as `null` under its key. So a reader can distinguish a
    diverged loss from a loss that was not logged.
    """

    def __init__(self, path: Path, /) -> None:
        # `path` is positional only, so that the `logger.args` of a checkpoint cannot set it.
        self._path = path
        self._file = open_own(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        with open_regular(path) as written:
            self._length, self._digest = digest_of(written)
        self._unwritten = b""
        self._is_torn = False
        self.failure: OSError | NotSaved | None = None
        """First error of writing a record, after which the run must save and stop; None if there was none."""
        self._place = SamePlace(path.parent, path)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write `metrics` as one line that begins with the step; keep an error in `failure`.

        Only rank 0 has the records. All ranks stop together after this step, and the save raises the error on all.
        """
        self.append(step, {key: _finite_or_none(value) for key, value in metrics.items()})

    def append(self, step: int, content: Mapping[str, object]) -> None:
        """Write `content`, which JSON can hold, as one line that begins with the step; keep an error in `failure`."""
        record = {STEP: step} | {key: value for key, value in content.items() if key != STEP}
        self._unwritten += json.dumps(record, allow_nan=False).encode() + b"\n"
        try:
            self._place.check()
            self._write()
        except (OSError, NotSaved) as error:
            self.failure = self.failure or error

    def _write(self) -> None:
        if self._is_torn:  # a part of a line was written before an error
            os.ftruncate(self._file, self._length)
        done = 0
        self._is_torn = True
        while done < len(self._unwritten):
            done += os.write(self._file, self._unwritten[done:])
        self._is_torn = False
        self._length += done
        self._digest.update(self._unwritten)
        self._unwritten = b""

    @property
    def name(self) -> str:
        """Name of the file."""
        return self._path.name

    def sync(self) -> Covered:
        """Wait until all records are on disk, and return their length and digest for a checkpoint.

        Raises:
            NotSaved: A record cannot be written, or the file is no longer at its path.
        """
        try:
            self._write()
            os.fsync(self._file)
            self._place.check()
            sync_directory(self._path.parent)
        except OSError as error:
            reason = error.strerror or error
            raise NotSaved(
                f"{self._path}: cannot be written: {reason}; no checkpoint is saved without its records"
            ) from error
        return Covered(self._length, self._digest.hexdigest())

    def raise_failure(self) -> None:
        """Raise NotSaved if a record could not be written at first, and was written by `sync`."""
        if self.failure is not None:
            reason = getattr(self.failure, "strerror", None) or self.failure
            raise NotSaved(
                f"{self._path}: could not be written: {reason}; now it can, so the state and all records are saved"
            ) from self.failure

    def close(self, summary: Mapping[str, float | str], exit_code: int) -> None:
        """Close the file without a summary, which can be computed from its records."""
        os.close(self._file)


def _finite_or_none(value: float) -> float | None:
    number = value if isinstance(value, int) else float(value)
    return number if math.isfinite(number) else None
