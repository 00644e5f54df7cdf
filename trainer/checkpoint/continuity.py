"""What a checkpoint stores of its session, so that a change of the run directory since then is noticed.

That is the SHA-256 of the configuration in force, the records that were on disk before the checkpoint, and whether all
steps of the session were skipped.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.checkpoint.format import (
    INDEX,
    CheckpointError,
    DamagedCheckpoint,
    check_files,
    damaged,
    read_index,
    read_marker,
    read_values,
)
from trainer.checkpoint.places import set_aside
from trainer.checkpoint.store import newest_checkpoint, stored_progress
from trainer.errors import ConfigError
from trainer.rundir.checkpoints import MARKER, SCALARS, committed, step_of
from trainer.rundir.continuing import Covered, check_records, has_only_records
from trainer.rundir.directory import META, METRICS, RunDir
from trainer.rundir.lock import held_by
from trainer.rundir.pairs import PAIRS

COVERED = {METRICS: "records", PAIRS: "pairs"}
"""Files of a run that a checkpoint relies on, with the keys of their length and digest in its session."""


def session_facts(
    config_sha256: str, covered: Mapping[str, Covered], *, skipped_all: bool = False
) -> dict[str, Any]:
    """Return what a checkpoint stores of its session.

    Args:
        config_sha256: digest of its configuration.
        covered: length and digest of the files in `COVERED` so far, by name; empty on ranks above 0.
        skipped_all: whether it failed so far (`trainer.loop.fit.Run.failed`): it skipped all its steps, or diverged.
    """
    return {
        "config_sha256": config_sha256,
        **{key: covered[name]._asdict() for name, key in COVERED.items() if name in covered},
        "skipped_all": skipped_all,
    }


def ended_failed(checkpoint: Path | None) -> bool:
    """Return whether the session that saved a checkpoint had skipped all its steps, or diverged; without one, False.

    For a checkpoint of an earlier version, which does not have this: whether all steps of the run were skipped.

    Raises:
        ConfigError: A file of the checkpoint is damaged or cannot be read.
    """
    if checkpoint is None:
        return False
    try:
        stored = _session_of(checkpoint).get("skipped_all")
        if stored is not None:
            return bool(stored)
        progress = stored_progress(checkpoint)
    except CheckpointError as error:
        raise refusal(error, checkpoint) from error
    return 0 < progress.step <= progress.skipped


def check_config(run_dir: RunDir, checkpoint: Path) -> None:
    """Check that `meta.json` still has the configuration with which a checkpoint was saved.

    A checkpoint of an earlier version, which has no digest of it, passes.

    Raises:
        ConfigError: The configuration is missing, or was changed; names the file.
        CheckpointError: The marker of the checkpoint is damaged or cannot be read.
    """
    digest = _session_of(checkpoint).get("config_sha256")
    if digest is not None and digest not in run_dir.config_digests():
        raise ConfigError(
            f"{run_dir.path / META} has no configuration with SHA-256 {digest}, with which {checkpoint.name} was saved;"
            " restore it from a copy"
        )


def check_resumable(run_dir: RunDir, *, restarted: bool, accept: bool, fallback: bool = False) -> list[str]:
    """Check what a run continues from, before anything is written; return notes for the user. No collective.

    Args:
        run_dir: directory of a run that has begun.
        restarted: whether torchrun or a sweep restarts a run that failed. Such a run begins again if it has no
            checkpoint.
        accept: whether the user accepts records that were changed.
        fallback: whether checkpoints that are damaged or cannot be read are renamed if an older one is whole.

    Raises:
        ConfigError: A folder is a link, the overrides, the configuration or the records were changed, or there are
            records but no checkpoint.
    """
    run_dir.check_own_folders()
    run_dir.check_overrides()
    if held_by(run_dir.path):
        return []  # The lock names that session. If it ends now, the checks under the lock follow.
    notes = _fall_back(run_dir.checkpoints) if fallback else []
    path = run_dir.metrics_path
    checkpoint = newest_checkpoint(run_dir.checkpoints)
    if checkpoint is None:
        if not restarted and has_only_records(run_dir):
            raise ConfigError(
                f"resume: {run_dir.path} has records and no checkpoint to continue from; start a new run, or rename"
                f" {path.name} to begin again in this directory"
            )
        return notes
    try:
        check_files(checkpoint, (INDEX, SCALARS), read_marker(checkpoint))
        check_config(run_dir, checkpoint)
        covered = covered_by(checkpoint)
    except CheckpointError as error:
        raise refusal(error, checkpoint) from error
    if not accept:
        for name, first in covered.items():
            check_records(run_dir.path / name, step_of(checkpoint), first)
    return notes


def _fall_back(folder: Path) -> list[str]:
    """Rename all checkpoints that are newer than the newest whole one, if there is one; return a warning for each."""
    faults: list[tuple[Path, CheckpointError]] = []
    for checkpoint in reversed(committed(folder)):
        try:
            files = read_marker(checkpoint)
            check_files(checkpoint, files, files)
            read_index(checkpoint)
            stored_progress(checkpoint)
        except CheckpointError as error:
            faults.append((checkpoint, error))
        else:
            return [
                f"{warning}; the run continues from {checkpoint.name}"
                for place, error in faults
                for warning in set_aside(place, f"cannot be used ({error})")
            ]
    return []


def covered_by(checkpoint: Path) -> dict[str, Covered]:
    """Return what a checkpoint covers of the files in `COVERED`, by name; one of an earlier version may lack a file.

    Raises:
        CheckpointError: The marker of the checkpoint is damaged or cannot be read.
    """
    stored = _session_of(checkpoint)
    found = {name: stored[key] for name, key in COVERED.items() if stored.get(key) is not None}
    try:
        return {name: Covered(int(own["bytes"]), str(own["sha256"])) for name, own in found.items()}
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise damaged(checkpoint, MARKER, f"has no length and SHA-256 of the records ({error!r})") from error


def refusal(error: CheckpointError, checkpoint: Path) -> ConfigError:
    """Return the error for a checkpoint from which a run cannot continue, with what the user can do."""
    older = [path.name for path in committed(checkpoint.parent) if path != checkpoint]
    condition = "" if isinstance(error, DamagedCheckpoint) else "if this does not pass, "
    if older:
        advice = f"{condition}resume.fallback=true continues from {older[-1]} or an older one"
    else:
        advice = f"{condition}restore it from a copy: there is no older checkpoint"
    return ConfigError(f"resume: {error}; {advice}")


def _session_of(checkpoint: Path) -> Mapping[str, Any]:
    session = read_values(checkpoint, MARKER).get("session", {})
    if not isinstance(session, Mapping):
        raise damaged(checkpoint, MARKER, "has no facts of its session")
    return session
