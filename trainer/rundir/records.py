"""Parse lines of `metrics.jsonl`, read the newest, remove those after a step. Imports no numpy and no torch.

What needs only the step of a line also serves `pairs.jsonl`.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError
from trainer.rundir.files import open_regular, write_atomically
from trainer.rundir.keys import STEP

Record = tuple[int, dict[str, float]]
"""Step and values of one line; NaN replaces a value that was not finite."""
FIRST_READ_BYTES = 1 << 18
"""Bytes read from the end of the file at first; each further read takes 8 times as many."""
MAX_NEWEST_BYTES = FIRST_READ_BYTES * 8**2
"""Largest number of bytes read from the end of the file."""
MAX_LINE_BYTES = 1 << 24
"""Largest length in bytes of a line."""


def parse_record(line: bytes) -> Record:
    """Parse one line.

    Raises:
        ValueError: The line is no JSON object with `train/step`.
    """
    try:
        record = json.loads(line)
        return int(record[STEP]), {key: _number(value) for key, value in record.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"expected a JSON object with {STEP}, got {line[:60]!r}") from error


def newest_records(path: Path, enough: Callable[[Sequence[Record]], bool]) -> list[Record]:
    """Read records from the end of the file until `enough` returns true, or `MAX_NEWEST_BYTES` are read.

    A torn last line is ignored. A missing file has no records.

    Raises:
        ConfigError: A line before the last is no record.
    """
    records: list[Record] = []
    for lines in _last_lines(path, MAX_NEWEST_BYTES):
        records = _parsed(path, lines)
        if enough(records):
            break
    return records


def last_step(path: Path) -> int:
    """Return the step of the last complete record, 0 if there is none."""
    for lines in _last_lines(path, FIRST_READ_BYTES):
        for line in reversed(lines):
            try:
                return parse_record(line)[0]
            except ValueError:
                continue  # half written
    return 0


def last_line(path: Path) -> bytes | None:
    """Return the last complete line of a file, without its end; None if it is missing or has no complete line.

    A line of more than `MAX_LINE_BYTES` is not found.
    """
    for lines in _last_lines(path, MAX_LINE_BYTES):
        if len(lines) > 1 and lines[-2]:
            return lines[-2]
    return None


def records_of(path: Path) -> Iterator[dict[str, float]]:
    """Yield the values of all complete records; a torn last line is none, and a missing file has none.

    Raises:
        ConfigError: A line before the last is no record, or is longer than `MAX_LINE_BYTES`.
    """
    for line in _lines(path) if path.exists() else ():
        if line.endswith(b"\n"):
            try:
                yield parse_record(line)[1]
            except ValueError as error:
                raise ConfigError(f"{path}: {error}") from error


def truncate_after(path: Path, step: int) -> None:
    """Remove the records after `step` and what follows the last one up to it, atomically.

    A resumed run starts at its checkpoint's step and logs the steps after it again. A missing file is left missing.

    Raises:
        ConfigError: A line before a record that is kept is no record, or a line if none is kept, or a line is longer
            than `MAX_LINE_BYTES`.
    """
    if not path.exists():
        return
    lines = list(_lines(path))
    steps = [_step(line) for line in lines]
    kept = [number for number, own in enumerate(steps) if own is not None and own <= step]
    last = max(kept, default=len(lines) - 1)
    damaged = [number for number, own in enumerate(steps) if own is None and number < last]
    if damaged:
        raise ConfigError(
            f"{path}, line {damaged[0] + 1}: expected a JSON object with {STEP},"
            f" got {lines[damaged[0]][:60]!r}; restore the file from a copy, or remove this line"
        )
    if len(kept) < len(lines):
        write_atomically(path, b"".join(lines[number] for number in kept), make_folder=False)


def _lines(path: Path) -> Iterator[bytes]:
    with open_regular(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b""), start=1):
            if len(line) == MAX_LINE_BYTES:
                raise ConfigError(
                    f"{path}, line {number}: expected less than {MAX_LINE_BYTES} bytes in a line"
                )
            yield line


def _step(line: bytes) -> int | None:
    """Return the step of a complete line; None for a torn or damaged one."""
    try:
        return parse_record(line)[0] if line.endswith(b"\n") else None
    except ValueError:
        return None


def _last_lines(path: Path, most: int) -> Iterator[list[bytes]]:
    """Yield longer and longer ends of a file, up to `most` bytes, as lines; what follows the last line feed is last.

    A missing file has none.
    """
    if not path.exists():
        return
    size, length = path.stat().st_size, FIRST_READ_BYTES
    while True:
        with open_regular(path) as file:
            file.seek(max(0, size - length))
            lines = file.read(length).split(b"\n")
        yield lines if length >= size else lines[1:]  # the first is most likely only the end of a line
        if length >= min(size, most):
            return
        length *= 8


def _parsed(path: Path, lines: Sequence[bytes]) -> list[Record]:
    lines = lines[:-1] if lines and not lines[-1] else lines
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(parse_record(line))
        except ValueError as error:
            if number < len(lines):  # the last line may be half written
                raise ConfigError(f"{path}: {error}") from error
    return records


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
