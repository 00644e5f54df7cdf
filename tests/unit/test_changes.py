"""Snapshots that store changes in bfloat16, and what is read from them. One process, no command."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ema import EMABank, EMAConfig
from launch.synthesizing import rounding
from launch.synthesizing.basis import Basis, Kept, find_basis
from launch.synthesizing.weights import Stock, Synthesized
from tests.unit.test_saving import make_run
from trainer.checkpoint import saving
from trainer.checkpoint.saving import Ways
from trainer.checkpoint.series import Series
from trainer.checkpoint.store import TensorReader, stored_tensors
from trainer.config.schema import EMAGroupConfig
from trainer.errors import ConfigError
from trainer.rundir.directory import RunDir

pytestmark = pytest.mark.usefixtures("group")
AVERAGES = {"a": EMAConfig(decay=0.9)}
STEPS = 8


class Walk:
    """A run whose weights walk at random, with a snapshot after each step."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.warned = folder, list[str]()
        self.module = nn.Linear(300, 20, bias=False)
        self.run = make_run()
        self.run.network = replace(self.run.network, module=self.module)
        self.run.bank, self.run.step = EMABank(self.module, AVERAGES), 0
        self.averages: dict[int, Tensor] = {}

    def session(self, last: int, dtype: str = "bfloat16", **ways: Any) -> None:
        config = EMAGroupConfig(snapshots=STEPS, snapshot_dtype=dtype)
        run = self.run
        with Series(
            self.folder / "snapshots", Ways(self.warned.append, **ways), config, STEPS, dict
        ) as series:
            series.begin(run, self.warned.append)
            for step in range(run.step + 1, last + 1):
                generator = torch.Generator().manual_seed(step)
                with torch.no_grad():
                    self.module.weight.add_(0.01 * torch.randn(20, 300, generator=generator))
                run.step = step
                run.bank.update(self.module, iteration=step)
                self.averages[step] = run.bank["a"].state_dict(snapshot=True)["weight"]
                series.after_step(run)
                series.before_change()

    def kept(self, step: int = STEPS) -> dict[int, Kept]:
        basis = find_basis(RunDir(self.folder, {}), step, self.module, ["ema/*"], AVERAGES)
        return {one.snapshot.step: one for one in basis.kept}

    def errors(self, step: int = STEPS) -> dict[int, float]:
        """Distance of each snapshot from its average, relative to the average's distance from the live weights."""
        live, stock = self.module.weight.detach(), Stock(self.module)
        found = {}
        for number, one in self.kept(step).items():
            read = Synthesized(stock, [one], [1.0]).weights(self.module)["weight"]
            found[number] = float(
                (read - self.averages[number]).norm() / (self.averages[number] - live).norm()
            )
        return found


def walk(folder: Path) -> Walk:
    torch.manual_seed(0)
    return Walk(folder)


def stored(folder: Path) -> dict[str, Tensor]:
    found = {}
    for path in sorted((folder / "snapshots").glob("step-*[0-9]")):
        reader = TensorReader(path)
        found |= {f"{path.name}/{key}": reader.read(key) for key in stored_tensors(path)}
    return found


@pytest.mark.parametrize("background", [False, True])
def test_changes_take_half_the_space_and_do_not_add_up_their_rounding(
    tmp_path: Path, background: bool
) -> None:
    one = walk(tmp_path)
    one.session(STEPS, background=background)
    dtypes = {key.split("/")[0]: tensor.dtype for key, tensor in stored(tmp_path).items() if "weight" in key}
    assert list(dtypes.values()) == [torch.float32] * 2 + [torch.bfloat16] * 7
    errors = one.errors()
    assert list(errors) == list(range(1, STEPS + 1)) and max(errors.values()) < 1e-3
    plain = one.averages[STEPS].bfloat16().float() - one.averages[STEPS]
    assert plain.norm() / (one.averages[STEPS] - one.module.weight).norm() > 1e-3


def test_a_series_that_was_interrupted_goes_on_bit_for_bit(tmp_path: Path) -> None:
    for name in ("whole", "halved"):
        (tmp_path / name).mkdir()
    walk(tmp_path / "whole").session(STEPS)
    halved = walk(tmp_path / "halved")
    for last in (3, 4, STEPS):
        halved.session(last)
    one, other = stored(tmp_path / "whole"), stored(tmp_path / "halved")
    assert one.keys() == other.keys() and not halved.warned[0].startswith("warning")
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("fault", ["missing", "damaged", "of another run"])
def test_changes_since_a_lost_snapshot_are_named_and_left_out(tmp_path: Path, fault: str) -> None:
    (tmp_path / "other").mkdir()
    one = walk(tmp_path)
    one.session(STEPS)
    lost = tmp_path / "snapshots" / "step-00000004"
    if fault == "damaged":
        file = next(lost.glob("*.distcp"))
        file.write_bytes(bytes(len(file.read_bytes())))
    else:
        shutil.rmtree(lost)
    if fault == "of another run":
        torch.manual_seed(1)
        Walk(tmp_path / "other").session(STEPS)
        shutil.copytree(tmp_path / "other" / "snapshots" / lost.name, lost)
    with pytest.raises(ConfigError) as error:
        one.kept()
    first = "step-00000004" if fault == "damaged" else "has changes since the snapshot of step"
    assert first in str(error.value) and "newest of ema/* are of step 3" in str(error.value)
    assert list(one.kept(3)) == [1, 2, 3] and max(one.errors(3).values()) < 1e-3


def test_the_step_is_measured_by_weights_and_not_by_a_stored_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the rounding of the change itself, the errors are those of the same series in float32."""
    monkeypatch.setattr(rounding, "ONCE", 0.0)
    found = []
    for dtype in ("float32", "bfloat16"):
        (tmp_path / dtype).mkdir()
        one = walk(tmp_path / dtype)
        one.session(STEPS, dtype)
        basis = Basis(STEPS, [one.kept()[STEPS]], [], 0)
        found += rounding.rounding_of(basis, Stock(one.module), one.module) or []
    assert found == [pytest.approx(found[0], rel=1e-2)] * 2


def test_after_a_lost_snapshot_a_session_begins_with_a_whole_one(tmp_path: Path) -> None:
    one = walk(tmp_path)
    one.session(4)
    shutil.rmtree(tmp_path / "snapshots" / "step-00000003")
    one.session(STEPS)
    assert any("step-00000004 has changes since the snapshot of step 3" in text for text in one.warned)
    assert list(one.errors()) == [1, 2, 5, 6, 7, 8] and max(one.errors().values()) < 1e-3


@pytest.mark.parametrize("background", [False, True])
def test_no_change_refers_to_a_snapshot_that_could_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    write = saving.write

    def failing(prepared: Any, *args: Any, **more: Any) -> None:
        if prepared.path.name == "step-00000004":
            raise OSError(28, "No space left on device")
        write(prepared, *args, **more)

    monkeypatch.setattr(saving, "write", failing)
    one = walk(tmp_path)
    one.session(STEPS, background=background)
    assert any("step 4 cannot be written" in text for text in one.warned)
    assert list(one.errors()) == [1, 2, 3, 5, 6, 7, 8] and max(one.errors().values()) < 1e-3


def test_a_series_may_change_its_dtype(tmp_path: Path) -> None:
    one = walk(tmp_path)
    one.session(3, "float32")
    one.session(6)
    one.session(STEPS, "float32")
    assert list(one.errors()) == list(range(1, STEPS + 1)) and max(one.errors().values()) < 1e-3
    assert sum(key.endswith("change/a/weight") for key in stored(tmp_path)) == 3
