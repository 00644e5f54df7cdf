"""Make the certificate of a run: carry out the checks, print the table, write the file."""

import json
import platform
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from launch.certifying.checks import Checks
from launch.certifying.request import Request
from launch.certifying.rows import Row, failed
from launch.certifying.running import RunFailed
from launch.sweeps.signals import temporary_folder
from trainer.distributed.processes import choose_device
from trainer.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILED, ConfigError
from trainer.report.text.table import Line, Table
from trainer.report.text.terminal import print_tables
from trainer.rundir.circumstances import versions
from trainer.rundir.directory import RunDir, sha256_of
from trainer.rundir.files import write_atomically
from trainer.shell.printable import print_text

CERTIFICATE = "certificate.json"
"""Name of the file in the run directory."""


def certify(request: Request) -> int:
    """Carry out all checks, print and write the certificate, and return the exit code.

    Raises:
        ConfigError: The run's settings are refused. Nothing is written.
    """
    run_dir = request.setting.run_dir
    aside = run_dir.path / f".certify.{secrets.token_hex(3)}.tmp"
    with temporary_folder(aside, f"RUN_DIR: {run_dir.path}") as folder:
        rows = list(_rows(Checks(request, folder)))
    print_tables([_table(run_dir, rows)])
    path = run_dir.path / CERTIFICATE
    try:
        write_atomically(
            path, json.dumps(_content(request, rows), indent=2, allow_nan=False) + "\n", make_folder=False
        )
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
    print_text(f"written: {path}")
    return EXIT_FAILED if any(row.verdict == "FAILED" for row in rows) else EXIT_DONE


def _rows(checks: Checks) -> Iterator[Row]:
    """Yield the row of each check, and print its verdict and its time."""
    for name, check in checks.all().items():
        begin = time.monotonic()
        try:
            row = check()
        except RunFailed as error:
            if error.code == EXIT_BAD_INPUT:
                raise ConfigError(error.reason) from error
            row = failed(name, str(error))
        print_text(f"{name}: {row.verdict} ({time.monotonic() - begin:.0f} s)")
        yield row


def _table(run_dir: RunDir, rows: Sequence[Row]) -> Table:
    lines = []
    for row in rows:
        numbers = ("-" if number is None else f"{number:.3g}" for number in (row.difference, row.tolerance))
        lines.append(Line([row.check, *numbers, row.verdict], [None] * 4))
    notes = [f"{row.check}: {row.detail}" for row in rows]
    return Table(
        f"certificate of {run_dir.path.name}", ["check", "difference", "allowed", ""], lines, notes=notes
    )


def _content(request: Request, rows: Sequence[Row]) -> dict[str, Any]:
    device = choose_device(request.setting.config.trainer.device)
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    return {
        "run": request.setting.run_dir.path.name,
        "config_sha256": sha256_of(request.setting.run_dir.latest_config()),
        "steps": request.steps,
        "rows": [row.to_json() for row in rows],
        "device": {"type": device.type, "name": name},
        "versions": versions(),
    }
