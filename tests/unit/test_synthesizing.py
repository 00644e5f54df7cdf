"""Which stored weights are combined, over which tensors, and for which targets. One process, no training run."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from ema import EMABank, EMAConfig
from ema.posthoc import Snapshot
from ema.rounding import roundings
from launch.synthesizing import weights
from launch.synthesizing.basis import Basis, Kept, find_basis
from launch.synthesizing.bench import Bench, horizon_of
from launch.synthesizing.request import Target
from launch.synthesizing.rounding import rounding_of
from launch.synthesizing.weights import Stock, Synthesized
from tests.unit.test_saving import make_run
from trainer.checkpoint.saving import Ways
from trainer.checkpoint.series import Series
from trainer.config.schema import EMAGroupConfig
from trainer.errors import ConfigError
from trainer.rundir.directory import RunDir


class Rotated(nn.Module):
    """A layer with a complex weight, and a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = nn.Parameter(torch.ones(3, dtype=torch.complex64))
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm((x * self.phase).abs())


def series_of(
    folder: Path,
    module: nn.Module,
    averages: dict[str, EMAConfig],
    steps: int,
    every: int = 1,
    size: float = 1.0,
    **more: Any,
) -> None:
    """Keep a snapshot of every so many steps of a run whose weights change at random."""
    run = make_run()
    run.network = replace(run.network, module=module)
    run.bank, run.step = EMABank(module, averages), 0
    with Series(
        folder / "snapshots", Ways(print), EMAGroupConfig(snapshots=steps // every, **more), steps, dict
    ) as series:
        series.begin(run, print)
        for run.step in range(1, steps + 1):
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.add_(size * torch.randn_like(parameter))
            run.bank.update(module, iteration=run.step)
            series.after_step(run)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(("memory", "loads"), [(10**6, 5), (3 * 24, 7), (0, 10)])
def test_stored_weights_stay_in_memory_as_far_as_it_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: int, loads: int
) -> None:
    module, config, read = nn.Linear(3, 2, bias=False), EMAConfig(decay=0.9), []
    series_of(tmp_path, module, {"a": config}, 4)
    kept = find_basis(RunDir(tmp_path, {}), 4, module, ["*"], {"a": config}).kept
    load = weights.load_checkpoint
    monkeypatch.setattr(
        weights, "load_checkpoint", lambda *args, **more: (read.append(args), load(*args, **more))
    )
    stock = Stock(module, memory)
    first, again = (Synthesized(stock, kept, [0.2] * 5).weights(module)["weight"] for _ in range(2))
    assert len(read) == loads and torch.equal(first, again)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("buffers", [[], ["*running_*"]])
def test_all_that_an_average_averages_is_combined_and_nothing_that_it_copies(
    tmp_path: Path, buffers: list[str]
) -> None:
    module, config = Rotated(), EMAConfig(decay=0.9, average_buffers=buffers)
    series_of(tmp_path, module, {"a": config}, 4)
    found = find_basis(RunDir(tmp_path, {}), 4, module, ["*"], {"a": config})
    parameters = {"phase", "norm.weight", "norm.bias"}
    averaged = {"norm.running_mean", "norm.running_var"} if buffers else set()
    assert {one.snapshot.step for one in found.kept} == {0, 1, 2, 3, 4}
    assert all(one.keys.keys() == parameters | averaged for one in found.kept)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 0.5), ("bfloat16", 1.0)])
def test_the_rounding_of_stored_weights_is_not_enlarged_and_is_predicted(
    tmp_path: Path, dtype: str, limit: float
) -> None:
    """Five decays at three steps can make a short one, but for the rounding: the solution without it is far off."""
    torch.manual_seed(0)
    module = nn.Linear(300, 20, bias=False)
    decays = 0.5, 0.9, 0.97, 0.99, 0.997, 0.999
    averages = {f"d{decay}": EMAConfig(decay=decay) for decay in decays}
    series_of(tmp_path, module, averages, 60, every=20, size=1e-3, snapshot_dtype=dtype)
    basis = find_basis(RunDir(tmp_path, {}), 60, module, ["live", "ema/d0.9*"], averages)
    stock, target = Stock(module), Target("decay 0.5", averages["d0.5"])
    (tracked,) = (one for one in basis.compared if one.name == "ema/d0.5")
    wanted = Synthesized(stock, [tracked], [1.0]).weights(module)["weight"]
    far = (wanted - module.weight.detach()).norm()

    def solved(basis: Basis) -> tuple[float, float]:
        found = basis.solve(target)
        made = Synthesized(stock, basis.kept, found.coefficients).weights(module)["weight"]
        return found.error, float((made - wanted).norm() / far)

    _, real = solved(basis)
    assert real > 1
    predicted, real = solved(replace(basis, rounding=rounding_of(basis, stock, module)))
    assert predicted / 4 < real < 1.3 * predicted and predicted < limit


@pytest.mark.usefixtures("group")
def test_a_long_average_counts_as_rounded_by_all_its_updates(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Linear(30, 20, bias=False)
    averages = {"short": EMAConfig(decay=0.5), "long": EMAConfig(decay=0.999)}
    series_of(tmp_path, module, averages, 300, every=300, size=1e-3)
    basis = find_basis(RunDir(tmp_path, {}), 300, module, ["*"], averages)
    found = dict(
        zip([one.name for one in basis.kept], rounding_of(basis, Stock(module), module) or [], strict=True)
    )
    assert found["live"] == found["ema/short"] > 0
    (updates,) = roundings([one.snapshot for one in basis.kept if one.name == "ema/long"])
    assert found["ema/long"] / found["live"] == pytest.approx(updates) and updates > 3


@pytest.mark.usefixtures("group")
def test_a_sum_of_float64_and_float32_is_added_up_in_float64(tmp_path: Path) -> None:
    """The initial weights are float32 and come first; averages in float64 allow large coefficients."""
    torch.manual_seed(0)
    module = nn.Linear(300, 20, bias=False)
    averages = {f"d{decay}": EMAConfig(decay=decay, dtype="float64") for decay in (0.5, 0.9, 0.97, 0.99)}
    series_of(tmp_path, module, averages, 60, every=10, size=1e-6)
    basis = find_basis(RunDir(tmp_path, {}), 60, module, ["live", "ema/d0.9*"], averages)
    stock, average = Stock(module), averages["d0.5"]
    (tracked,) = (one for one in basis.compared if one.name == "ema/d0.5")
    wanted = stock.weights(tracked)["weight"]
    found = replace(basis, rounding=rounding_of(basis, stock, module)).solve(Target("decay 0.5", average))
    assert basis.kept[0].name == "live" and found.coefficients[0] != 0
    made = Synthesized(stock, basis.kept, found.coefficients).weights(module)["weight"]
    assert (made - wanted).norm() < 2 * found.error * (wanted - module.weight.detach()).norm()


@pytest.mark.usefixtures("group")
def test_the_error_of_a_correction_of_the_lag_is_predicted_for_its_own_weights(tmp_path: Path) -> None:
    """M + a (M - F), where M and F were tracked too. F is far from the live weights, and its distance counts."""
    torch.manual_seed(0)
    module = nn.Linear(300, 20, bias=False)
    tracked = {"m": EMAConfig(decay=0.5), "f": EMAConfig(type="debiased", decay=1 - 1 / 16)}
    averages = tracked | {f"d{decay}": EMAConfig(decay=decay) for decay in (0.9, 0.97)}
    series_of(tmp_path, module, averages, 60, every=10)
    basis = find_basis(RunDir(tmp_path, {}), 60, module, ["live", "ema/d*"], averages)
    stock, live = Stock(module), module.weight.detach().clone()
    m, f = (
        stock.weights(one)["weight"]
        for name in tracked
        for one in basis.compared
        if one.name == f"ema/{name}"
    )
    wanted = m + (m - f)

    def evaluate(network: Any, *, reestimate: bool) -> dict[str, Tensor]:
        squares = (network.module.weight.detach() - wanted).double().square()
        return {"loss": squares.flatten().reshape(8, -1).mean(1)}

    evaluation = SimpleNamespace(evaluate=evaluate, num_samples=8)
    parts = cast(Any, SimpleNamespace(evaluation=evaluation, network=SimpleNamespace(module=module)))
    bench = Bench(parts, stock, basis, "loss", False, lambda text: None)
    bench.search()
    trial = bench.trials[-1]
    assert trial.name == "decay 0.5 without lag (a=1.00)" and trial.synthesis is not None
    made = bench.averages[trial.name].weights(module)["weight"]
    off = float((made - wanted).norm() / (wanted - live).norm())
    assert 0.5 < off / trial.synthesis.error < 2


def kept(step: int, **more: Any) -> Kept:
    return Kept(Path(f"step-{step:08d}"), "live", {}, {}, Snapshot(step, **more))


def test_a_profile_that_begins_before_the_stored_weights_is_refused() -> None:
    basis = Basis(30, [kept(10), kept(20), kept(30)], [], 0)
    assert sum(basis.solve(Target("fits", profile="linear", window=21)).coefficients) == pytest.approx(1)
    with pytest.raises(ConfigError, match=r"linear 22: expected no weight before step 10, .* begins at 9"):
        basis.solve(Target("linear 22", profile="linear", window=22))
    from_the_start = Basis(30, [kept(20, config=EMAConfig(), origin=0), kept(30)], [], 0)
    assert from_the_start.solve(Target("fits", profile="linear", window=31)).warnings


@pytest.mark.parametrize(
    ("config", "age", "expected"),
    [
        (EMAConfig(decay=0.9), 100, 10),
        (EMAConfig(decay=0.9, type="debiased"), 2, 1.9),
        (EMAConfig(type="power", gamma=3), 100, 100 / 4),
        (EMAConfig(decay=1.0), 100, None),
        (None, 100, None),
        (EMAConfig(), 0, None),
    ],
)
def test_the_horizon_follows_from_the_decay_of_the_last_step(
    config: EMAConfig | None, age: int, expected: float | None
) -> None:
    assert horizon_of(config, age) == (None if expected is None else pytest.approx(expected, rel=0.02))
