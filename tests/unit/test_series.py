"""Steps of the snapshots of a run, and what a session does with the snapshots of an earlier one. One process."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from ema import EMABank, EMAConfig
from tests.makers import assert_same
from tests.unit.test_saving import make_run, steps
from trainer.checkpoint.saving import Ways
from trainer.checkpoint.series import Series, set_aside_later, snapshot_steps
from trainer.checkpoint.store import load_checkpoint, stored_tensors
from trainer.config.schema import EMAGroupConfig
from trainer.errors import ConfigError


@pytest.mark.parametrize(
    ("spacing", "expected"),
    [
        ("uniform", [25, 50, 75, 100]),
        ("geometric", [3, 10, 32, 100]),
        ("both", [10, 50, 100]),
    ],
)
def test_the_steps_of_the_snapshots_end_at_the_last_step(spacing: str, expected: list[int]) -> None:
    assert snapshot_steps(100, 4, spacing) == expected
    assert snapshot_steps(3, 8, spacing)[-1] == 3 and set(snapshot_steps(3, 8, spacing)) <= {1, 2, 3}
    assert snapshot_steps(100, 0, spacing) == []


@pytest.mark.usefixtures("group")
def test_later_snapshots_are_renamed_and_kept_ones_stay(tmp_path: Path) -> None:
    run, said = make_run(), list[str]()
    config = EMAGroupConfig(snapshots=4)

    with Series(tmp_path / "snapshots", Ways(said.append), config, 8, dict) as first:
        first.begin(run, said.append)
        for _ in range(4):
            steps(run, 1)
            first.after_step(run)
    names = ["step-00000002", "step-00000004", "step-00000006"]
    assert sorted(path.name for path in (tmp_path / "snapshots").iterdir()) == names
    stored = stored_tensors(tmp_path / "snapshots" / names[0])
    assert {key.split("/")[0] for key in stored} == {"ema"} and "ema/0.9/0.weight" in stored
    warned = set_aside_later(tmp_path / "snapshots", 5)
    renamed = f"{names[2]}.stale-1"
    assert sorted(path.name for path in (tmp_path / "snapshots").iterdir()) == [*names[:2], renamed]
    (text,) = warned
    assert "this one begins at step 5" in text and renamed in text
    assert len(set_aside_later(tmp_path / "snapshots", 0)) == 2  # the run begins again


@pytest.mark.usefixtures("group")
def test_a_snapshot_that_a_killed_session_did_not_finish_is_taken_by_the_next(tmp_path: Path) -> None:
    run = make_run()
    steps(run, 2)

    def begun() -> list[str]:
        with Series(tmp_path / "snapshots", Ways(print), EMAGroupConfig(snapshots=4), 8, dict) as series:
            series.begin(run, print)
        return [path.name for path in (tmp_path / "snapshots").glob("*")]

    loaded, run.bank = run.bank, EMABank(run.network.module, {"0.9": EMAConfig(decay=0.9)})
    assert begun() == []  # the average is new, so it has no origin yet
    run.bank = loaded
    assert begun() == ["step-00000004"]
    shadow = run.bank["0.9"].state_dict(snapshot=True)
    stored = load_checkpoint(tmp_path / "snapshots" / "step-00000004", {"ema": {"0.9": shadow}})
    assert_same(stored["ema"]["0.9"], run.bank["0.9"].state_dict())


@pytest.mark.usefixtures("group")
def test_a_disk_without_room_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    usage = namedtuple("usage", "free")
    size = sum(t.nbytes for t in run.bank["0.9"].state_dict().values() if isinstance(t, torch.Tensor))
    with Series(tmp_path / "snapshots", Ways(print), EMAGroupConfig(snapshots=3), 8, dict) as series:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(3 * size - 1))
        text = r"[\d.]+ ([KMGTP]i)?B"
        with pytest.raises(
            ConfigError, match=rf"^ema\.snapshots: 3 .* of {text} do not fit into the {text} that"
        ):
            series.begin(run, print)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(3 * size))
        series.begin(run, print)
    assert not (tmp_path / "snapshots").exists()
