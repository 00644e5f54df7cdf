"""Read `metrics.jsonl` as columns: hundreds of runs are read in seconds and fit into memory."""

import json
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.errors import ConfigError
from trainer.rundir.files import open_regular
from trainer.rundir.keys import STEP
from trainer.rundir.records import MAX_LINE_BYTES

MAX_SHAPES = 8
"""Number of key sets that are read fast: records with and without an evaluation, before and after an average starts."""
READ_BYTES = 2 * MAX_LINE_BYTES
"""Bytes of the file that are in memory at once."""
MAX_STEP = 2**53
"""Steps below are exact in float64."""


class Series(NamedTuple):
    """The values logged under one key."""

    steps: NDArray[np.int64]
    """Steps in rising order."""
    values: NDArray[np.float64]
    """Value at each step; NaN where it was not finite."""

    def pairs(self) -> list[tuple[int, float]]:
        """Return the list of (step, value)."""
        return list(zip(self.steps.tolist(), self.values.tolist(), strict=True))

    def finite(self) -> "Series":
        """Return the series without values that are not finite."""
        kept = np.isfinite(self.values)
        return Series(self.steps[kept], self.values[kept])


EMPTY = Series(np.empty(0, np.int64), np.empty(0))


class _Block(NamedTuple):
    """Records with the same keys."""

    keys: list[str]
    lines: NDArray[np.int64]
    """Line numbers in the file, from 0; of two records of a step the later one wins."""
    steps: NDArray[np.int64]
    columns: list[NDArray[np.float64]]
    """Values of each key, in the order of `keys`."""


def read_columns(path: Path, wanted: Callable[[str], bool]) -> dict[str, Series]:
    """Read a `metrics.jsonl` as one series per key, in the order in which the keys were first logged.

    Of several records of a step the later one wins. Keys that are not `wanted`, and a torn last line, are left out.

    Raises:
        ConfigError: A line before the last is damaged, or the file is no regular file.
    """
    blocks: list[_Block] = []
    first = 0
    for lines, is_last in _parts(path):
        part, damaged = _blocks(lines, wanted)
        # The last line may be incomplete: the run is writing it, or was killed while it wrote.
        if damaged and (damaged[0] < len(lines) - 1 or not is_last):
            raise ConfigError(f"{path}, line {first + damaged[0] + 1}: expected a JSON object with {STEP}")
        blocks += [block._replace(lines=block.lines + first) for block in part]
        first += len(lines)
    parts: dict[str, list[tuple[_Block, int]]] = {}
    for block in sorted(blocks, key=lambda block: block.lines[0]):
        for row, key in enumerate(block.keys):
            parts.setdefault(key, []).append((block, row))
    return {key: _joined(blocks_of_key) for key, blocks_of_key in parts.items()}


def _parts(path: Path) -> Iterator[tuple[list[bytes], bool]]:
    """Read the lines of a file in parts; yield each part and whether it is the last one."""
    rest = b""
    with open_regular(path) as file:
        while block := file.read(READ_BYTES):
            whole, newline, begun = block.rpartition(b"\n")
            if len(rest) + len(block if not newline else begun) > READ_BYTES:
                raise ConfigError(f"{path}: expected less than {MAX_LINE_BYTES} bytes in a line")
            if newline:
                yield (rest + whole).splitlines(), False
                rest = begun
            else:
                rest += block
    yield rest.splitlines(), True


def _blocks(lines: Sequence[bytes], wanted: Callable[[str], bool]) -> tuple[list[_Block], list[int]]:
    """Return the records of a part of the file, and the numbers of the lines in it that are none."""
    blocks: list[_Block] = []
    left = list(range(len(lines)))
    for _ in range(MAX_SHAPES):
        if left and (shape := _shape(lines[left[0]], wanted)) is not None:
            alike, left = _alike(lines, left, *shape)
            blocks += alike
    others, damaged = _one_by_one(lines, left, wanted)
    return blocks + others, damaged


def _shape(line: bytes, wanted: Callable[[str], bool]) -> tuple[list[str], re.Pattern[bytes]] | None:
    """Return the wanted keys of a record, and a pattern of lines with the same keys; None for other lines.

    Most lines of a file match a few patterns. Reading their numbers by pattern makes no dictionary per line and skips
    unwanted keys; it is twice as fast as the JSON parser.
    """
    if (record := _record(line)) is None:
        return None
    kept = [key for key in record if key != STEP and wanted(key)]
    number = rb"[-+.0-9eEnul]+"
    parts = [
        re.escape(json.dumps(key).encode())
        + b": "
        + (b"(" + number + b")" if key == STEP or key in kept else number)
        for key in record
    ]
    first = list(record).index(STEP) == 0
    return (kept, re.compile(rb"\{" + b", ".join(parts) + rb"\}")) if first else None


def _alike(
    lines: Sequence[bytes], places: Sequence[int], keys: list[str], pattern: re.Pattern[bytes]
) -> tuple[list[_Block], list[int]]:
    """Return the block of the lines that match the pattern, and the line numbers of all others."""
    matches = [pattern.fullmatch(lines[place]) for place in places]
    matching = [place for place, match in zip(places, matches, strict=True) if match]
    numbers = b",".join(b",".join(match.groups()) for match in matches if match).replace(b"null", b"nan")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            table = np.fromstring(numbers, sep=",").reshape(len(matching), 1 + len(keys))
    except (ValueError, DeprecationWarning):
        table = np.empty((0, 1))
    if not len(table) or not (abs(table[:, 0]) < MAX_STEP).all():
        return [], list(places)  # a match was no step: _one_by_one reports its line
    columns = [np.where(np.isinf(column), np.nan, column) for column in table[:, 1:].T]
    block = _Block(keys, np.array(matching), table[:, 0].astype(np.int64), columns)
    return [block], [place for place, match in zip(places, matches, strict=True) if not match]


def _one_by_one(
    lines: Sequence[bytes], places: Sequence[int], wanted: Callable[[str], bool]
) -> tuple[list[_Block], list[int]]:
    """Return the blocks of lines that no pattern matched, and the numbers of those that are no records."""
    shapes: dict[tuple[str, ...], list[tuple[int, dict[str, Any]]]] = {}
    damaged = []
    for place in places:
        if (record := _record(lines[place])) is None:
            damaged.append(place)
        else:
            shapes.setdefault(tuple(record), []).append((place, record))
    blocks = []
    for keys, alike in shapes.items():
        kept = [key for key in keys if key != STEP and wanted(key)]
        numbers = np.array([place for place, _ in alike])
        steps = np.array([int(record[STEP]) for _, record in alike])
        columns = [np.array([_number(record[key]) for _, record in alike]) for key in kept]
        blocks.append(_Block(kept, numbers, steps, columns))
    return blocks, damaged


def _record(line: bytes) -> dict[str, Any] | None:
    """Return the values of a line; None if it is no JSON object with a step."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and abs(_number(record.get(STEP))) < MAX_STEP else None


def _joined(parts: Sequence[tuple[_Block, int]]) -> Series:
    steps = np.concatenate([block.steps for block, _ in parts])
    values = np.concatenate([block.columns[row] for block, row in parts])
    if (np.diff(steps) <= 0).any():
        order = np.lexsort((np.concatenate([block.lines for block, _ in parts]), steps))
        steps, values = steps[order], values[order]
        latest = np.append(steps[1:] != steps[:-1], True)
        steps, values = steps[latest], values[latest]
    return Series(steps, values)


def _number(value: Any) -> float:
    try:
        number = float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:  # an integer with more than 300 digits
        return math.nan
    return number if math.isfinite(number) else math.nan
