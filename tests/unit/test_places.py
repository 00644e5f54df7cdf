"""What has a checkpoint's name and is none, and what cannot be deleted: neither ends a run, neither is followed."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.makers import save_checkpoint
from trainer.checkpoint import writing
from trainer.checkpoint.store import newest_checkpoint

STATE = {"w": torch.ones(3), "step": 1}


def save(folder: Path, step: int, keep: int = 2) -> list[str]:
    """Save a checkpoint; the warnings."""
    warnings: list[str] = []
    save_checkpoint(folder, step, STATE, keep=keep, warn=warnings.append)
    return warnings


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def of_the_user(path: Path) -> None:
    path.mkdir()
    (path / "notes.txt").write_text("mine")


def link_to_a_checkpoint(path: Path) -> None:
    other = save_checkpoint(path.parent.parent / "other", 500, STATE, keep=1)
    path.symlink_to(other)


def checkpoint_without_a_real_marker(path: Path) -> None:
    path.mkdir()
    (path / "COMMIT.json").symlink_to("COMMIT.json")


STALE: dict[str, Callable[[Path], object]] = {
    "file": lambda path: path.write_text("mine"),
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "link loop": lambda path: path.symlink_to(path.name),
    "link to a checkpoint": link_to_a_checkpoint,
    "folder of the user": of_the_user,
    "marker that is a link loop": checkpoint_without_a_real_marker,
    "pipe": lambda path: os.mkfifo(path),
}


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *((kind, "step-00000500") for kind in STALE),
        *((kind, "step-00000500.tmp") for kind in STALE if "marker" not in kind),
    ],
)
def test_what_is_no_checkpoint_is_renamed_and_the_save_goes_on(tmp_path: Path, kind: str, name: str) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / f"{name}.stale-1").write_text("an earlier one")
    STALE[kind](folder / name)
    before = (folder / name).lstat()
    other = {file: file.read_bytes() for file in tmp_path.glob("other/*/*")}
    (warning,) = save(folder, 500)
    assert warning.startswith(f"warning: {folder / name} ") and f"renamed to {name}.stale-2" in warning
    assert newest_checkpoint(folder) == folder / "step-00000500"
    assert not (folder / "step-00000500").is_symlink()
    assert (folder / f"{name}.stale-2").lstat().st_ino == before.st_ino
    assert {file: file.read_bytes() for file in tmp_path.glob("other/*/*")} == other
    assert not save(folder, 600)


def test_own_leftovers_are_deleted_without_a_word(tmp_path: Path) -> None:
    save(tmp_path, 1)
    left, unfinished = tmp_path / "step-00000002.tmp", tmp_path / "step-00000003"
    shutil.copytree(tmp_path / "step-00000001", unfinished)
    (unfinished / "COMMIT.json").unlink()
    shutil.copytree(unfinished, left)
    assert not save(tmp_path, 4)
    assert names(tmp_path) == ["step-00000001", "step-00000004"]


def test_a_leftover_that_cannot_be_deleted_is_renamed_if_it_is_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("step-00000002.tmp", "step-00000003.tmp"):
        (tmp_path / name).mkdir()

    def busy(path: Path) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        warnings = save(tmp_path, 2)
    assert [warning.split(": ")[2] for warning in warnings] == [
        "Device or resource busy; it is renamed to step-00000002.tmp.stale-1",
        "Device or resource busy; the next save tries again",
    ]
    assert not save(tmp_path, 4)
    assert names(tmp_path) == ["step-00000002", "step-00000002.tmp.stale-1", "step-00000004"]


@pytest.mark.parametrize("call", ["unlink", "rmtree"])
def test_a_prune_that_fails_is_a_warning_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    for step in (1, 2):
        save(tmp_path, step)

    def refuse(path: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(*((Path, "unlink") if call == "unlink" else (shutil, "rmtree")), refuse)
        patch.setattr("trainer.rundir.files._write", lambda path, content, put: path.write_text(content))
        first, second = save(tmp_path, 3), save(tmp_path, 4)
    expected = f"warning: {tmp_path}: an old checkpoint cannot be deleted: Read-only file system"
    assert first == [expected]
    assert expected in second
    assert newest_checkpoint(tmp_path) == tmp_path / "step-00000004"
    assert not save(tmp_path, 5)
    assert names(tmp_path) == ["step-00000004", "step-00000005"]


def test_a_save_makes_no_folder_for_a_directory_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither before the save, nor in the middle of it."""
    with pytest.raises(FileNotFoundError):
        save(tmp_path / "run" / "checkpoints", 1)
    (tmp_path / "run").mkdir()
    digest = writing.digest

    def move(path: Path) -> dict[str, int]:
        found = digest(path)
        if (tmp_path / "run").exists():
            (tmp_path / "run").rename(tmp_path / "moved")
        return found

    monkeypatch.setattr(writing, "digest", move)
    with pytest.raises(FileNotFoundError):
        save(tmp_path / "run" / "checkpoints", 1)
    assert names(tmp_path) == ["moved"]
