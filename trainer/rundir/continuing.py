"""Check and cut the records of a run that continues: a line that a checkpoint relies on is never lost unnoticed.

The records are `metrics.jsonl` and `pairs.jsonl`.

A checkpoint stores the length and the SHA-256 of the records that were on disk before it was committed (`Covered`).
A run that continues from it compares them, then cuts the records after them, because it makes those again.
"""

import hashlib
import os
from pathlib import Path
from typing import BinaryIO, NamedTuple

from trainer.errors import ConfigError
from trainer.rundir.directory import RunDir
from trainer.rundir.files import open_regular, sync_directory
from trainer.rundir.records import MAX_LINE_BYTES, parse_record, truncate_after

READ_BYTES = 1 << 20


class Covered(NamedTuple):
    """The first bytes of a file of records, which a checkpoint covers."""

    bytes: int
    """Number of bytes."""
    sha256: str
    """Hexadecimal SHA-256 of these bytes."""


def digest_of(file: BinaryIO, most: int | None = None) -> tuple[int, "hashlib._Hash"]:
    """Return the number and the SHA-256 of the bytes up to the end of a file, or of the next `most` bytes."""
    digest, length = hashlib.sha256(), 0
    while block := file.read(READ_BYTES if most is None else min(READ_BYTES, most - length)):
        digest.update(block)
        length += len(block)
    return length, digest


def check_records(path: Path, step: int, covered: Covered) -> None:
    """Compare the records in a file with those that the checkpoint of a step covers; change nothing.

    Raises:
        ConfigError: The file is missing, shorter or changed, or lines after these bytes are no later records.
    """
    advice = (
        "restore it from a copy, or add accept_changed_records=true to continue with the records as they are"
    )
    try:
        with open_regular(path) as file:
            length, digest = digest_of(file, covered.bytes)
            fault = None
            if length < covered.bytes:
                fault = (
                    f"has {length} bytes; expected at least {covered.bytes}, the records up to step {step}"
                )
            elif digest.hexdigest() != covered.sha256:
                fault = (
                    f"was changed; its records up to step {step} do not have the SHA-256 of the checkpoint"
                )
            elif (line := _foreign_line(file, step)) is not None:
                fault = f"was changed; after step {step} it has a line that is no later record: {line[:60]!r}"
    except FileNotFoundError:
        fault = f"is missing; expected {covered.bytes} bytes, the records up to step {step}"
    except OSError as error:
        fault = f"cannot be read: {error.strerror}"
    if fault is not None:
        raise ConfigError(f"resume: {path} {fault}; {advice}")


def _foreign_line(file: BinaryIO, step: int) -> bytes | None:
    """Return the first line that is no record of a step after `step`; an incomplete last line is allowed."""
    while line := file.readline(MAX_LINE_BYTES):
        if len(line) < MAX_LINE_BYTES and not line.endswith(b"\n"):
            break
        try:
            if parse_record(line)[0] <= step:
                return line
        except ValueError:
            return line
    return None


def cut_records(path: Path, step: int, covered: Covered | None) -> None:
    """Remove the records after the checkpoint's step, which the run makes again.

    `covered` is None for a checkpoint without it, and for records that the user accepted.

    Raises:
        ConfigError: As for `check_records`, or a line before the last is no record.
    """
    if covered is None:
        truncate_after(path, step)
        return
    check_records(path, step, covered)
    if path.stat().st_size > covered.bytes:
        os.truncate(path, covered.bytes)


def has_only_records(run_dir: RunDir) -> bool:
    """Return whether a run has records, but no checkpoint that it could continue from.

    An unfinished checkpoint counts as one: the run was killed while it saved its first one, and may begin again.

    Raises:
        ConfigError: The records are no regular file, or cannot be read.
    """
    return not run_dir.saves() and _has_records(run_dir.metrics_path)


def _has_records(path: Path) -> bool:
    """Return whether a `metrics.jsonl` has a complete line."""
    try:
        with open_regular(path) as file:
            return any(b"\n" in block for block in iter(lambda: file.read(READ_BYTES), b""))
    except FileNotFoundError:
        return False
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error


def set_aside(path: Path) -> Path | None:
    """Rename the records of a run that begins again; return the new path, None if there is no complete record.

    Raises:
        ConfigError: The file is no regular file, or the directory cannot be written.
    """
    kept = _has_records(path)
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.before-{number}")):
        number += 1
    try:
        if kept:
            path.rename(aside)
            sync_directory(path.parent)
        else:
            path.unlink(missing_ok=True)  # nothing, or one incomplete line
    except OSError as error:
        raise ConfigError(f"resume: {path.parent} cannot be written: {error.strerror}") from error
    return aside if kept else None
