"""`python -m launch.certify`: each check finds the fault that it is for, and no other check does."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm

import launch.exporting.weights
import launch.merge
import trainer.run
from ema.track import Track
from launch.certify import main, parse
from launch.certifying.checks import Checks
from launch.certifying.rows import EXPORTED, MERGED, PROFILE, RESUMED, SHARDED
from launch.sweeps.backends.base import resuming
from models.gpt import GPT
from tests.integration.commands import Warm
from tests.makers import TINY_GPT, freeze, make_run_dir
from trainer.checkpoint.training_state import BATCHNORM
from trainer.config.compose import compose
from trainer.optimizers import muon
from trainer.rundir.directory import RunDir

ROWS = [SHARDED, RESUMED, EXPORTED, PROFILE, MERGED]
BATCHNORM_RUN = (
    *("experiment=digits_noise", "model=resnet", "model.widths=[4]", "ema.batchnorm_batches=1"),
    *("ema.averages={late:{decay:0.9,start_iter:6},every:{type:warmup,update_every:3}}", "ema.decays=[]"),
    *("trainer.steps=30", "trainer.num_threads=1", "trainer.device=cpu", "logger=none"),
)
"""A model with buffers that must be in each state, and averages that the few steps of a certificate do not reach."""


def frozen(path: Path, *overrides: str) -> RunDir:
    """A run directory with the configuration of these overrides; a certificate needs no more of it."""
    return make_run_dir(path, freeze(compose(list(overrides))[0]))


@contextmanager
def decay_applied_backwards() -> Iterator[None]:
    gain_at = Track.gain_at

    def swapped(track: Track, *args: Any) -> Any:
        found = gain_at(track, *args)
        return None if found is None else (1 - found[0], found[1])

    with patch.object(Track, "gain_at", swapped):
        yield


@contextmanager
def shadow_frozen_after_its_first_update() -> Iterator[None]:
    gain_at = Track.gain_at

    def frozen(track: Track, *args: Any) -> Any:
        return None if track.counters.started else gain_at(track, *args)

    with patch.object(Track, "gain_at", frozen):
        yield


def origin_one_step_late() -> AbstractContextManager[object]:
    return patch("trainer.loop.fit.absorb_first_weights", lambda run: None)


@contextmanager
def buffer_forgotten_in_the_export() -> Iterator[None]:
    keys_by_name = launch.exporting.weights.keys_by_name

    def without(names: Any, average: Any, stored: Any) -> Any:
        return keys_by_name(names, average, [key for key in stored if not key.startswith(BATCHNORM)])

    refused = patch.object(launch.exporting.weights, "_refuse_unused", lambda *args: None)
    with patch.object(launch.exporting.weights, "keys_by_name", without), refused:
        yield


@contextmanager
def buffer_forgotten_by_resume() -> Iterator[None]:
    restore = trainer.run._restore

    def forgetful(config: Any, parts: Any, run_dir: Any) -> Any:
        start = restore(config, parts, run_dir)
        for module in parts.network.module.modules():
            if start is not None and isinstance(module, _BatchNorm):
                module.reset_running_stats()
        return start

    with patch.object(trainer.run, "_restore", forgetful):
        yield


@contextmanager
def shards_exchanged() -> Iterator[None]:
    build = trainer.run.build

    def exchanged(*args: Any) -> Any:
        parts = build(*args)
        if parts.processes.world_size == 2:
            for parameter in parts.network.module.parameters():
                local = parameter.data.to_local()
                both: list[Any] = [None, None]
                dist.all_gather_object(both, local)
                other = both[1 - parts.processes.rank]
                if other.shape == local.shape:
                    local.copy_(other)
        return parts

    with patch.object(trainer.run, "build", exchanged):
        yield


@contextmanager
def coefficients_reversed() -> Iterator[None]:
    paired = launch.merge._paired

    def backwards(snapshots: Any, coefficients: Sequence[float]) -> Any:
        return paired(snapshots, coefficients[::-1])

    with patch.object(launch.merge, "_paired", backwards):
        yield


MUTANTS = {
    shards_exchanged: SHARDED,
    buffer_forgotten_by_resume: RESUMED,
    buffer_forgotten_in_the_export: EXPORTED,
    decay_applied_backwards: PROFILE,
    shadow_frozen_after_its_first_update: PROFILE,
    origin_one_step_late: PROFILE,
    coefficients_reversed: MERGED,
}
"""Faults in the product, each with the only check that must fail; without a fault of its own each check is ok."""


def _within(mutant: Any, rank: int) -> AbstractContextManager[object]:
    found: AbstractContextManager[object] = mutant()
    return found


@pytest.fixture
def in_warm_processes(tmp_path: Path, warm: Warm, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """A function that lets the short runs run in processes that are there already, with a fault in them."""

    def carry_out(mutant: Any) -> None:
        def train(run_dir: RunDir, processes: int, allowed: Sequence[str]) -> None:
            within = partial(_within, mutant)
            warm(*resuming(str(run_dir.path), allowed), cwd=tmp_path, ranks=processes, within=within)

        monkeypatch.setattr("launch.certifying.checks.train", train)

    return carry_out


@pytest.mark.parametrize("mutant", MUTANTS)
def test_each_fault_fails_its_check_and_no_other(
    mutant: Any, tmp_path: Path, in_warm_processes: Callable[[Any], None]
) -> None:
    in_warm_processes(mutant)
    run_dir = frozen(tmp_path / "run", *BATCHNORM_RUN)
    with mutant():
        assert main([str(run_dir.path), "steps=2"]) == 1
    rows = json.loads((run_dir.path / "certificate.json").read_text())["rows"]
    assert [row["check"] for row in rows] == ROWS
    found = {row["check"]: row["verdict"] for row in rows}
    assert found == {check: "FAILED" if check == MUTANTS[mutant] else "ok" for check in ROWS}, rows


def muon_wrong_by_a_hundredth() -> AbstractContextManager[object]:
    change = muon._change
    return patch.object(muon, "_change", lambda *args: 1.01 * change(*args))


@pytest.mark.parametrize("mutant", [nullcontext, shards_exchanged, muon_wrong_by_a_hundredth])
def test_muon_is_compared_as_closely_as_other_optimizers(
    mutant: Any, tmp_path: Path, in_warm_processes: Callable[[Any], None]
) -> None:
    """Muon orthogonalises in bfloat16: with its own eps the last bit of a gradient changes a third digit."""
    in_warm_processes(mutant)
    own = (*TINY_GPT, "model.vocab_size=256", "optimizer=muon", "trainer.device=cpu")
    run_dir = frozen(tmp_path / "run", *own)
    row = Checks(parse([str(run_dir.path), "steps=2"]), tmp_path).sharded()
    assert row.verdict == ("ok" if mutant is nullcontext else "FAILED"), row
    assert mutant is not nullcontext or row.tolerance == 1e-5


class Amplifying(torch.optim.Optimizer):
    """An optimizer of a user that makes a difference in the seventh digit of a gradient one in the third."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(torch.sin(1e3 * parameter.grad), alpha=group["lr"])


@pytest.mark.parametrize(("mutant", "verdict"), [(nullcontext, "ok"), (shards_exchanged, "FAILED")])
def test_an_optimizer_that_amplifies_rounding_is_measured_by_another_order_of_sums(
    mutant: Any, verdict: str, tmp_path: Path, in_warm_processes: Callable[[Any], None]
) -> None:
    in_warm_processes(mutant)
    own = (*TINY_GPT, "model.vocab_size=256", "optimizer=custom", "trainer.device=cpu")
    target = "optimizer._target_=tests.integration.test_certify.Amplifying", "~optimizer.args.foreach"
    run_dir = frozen(tmp_path / "run", *own, *target, "allow_targets=[tests.]")
    row = Checks(parse([str(run_dir.path), "steps=2", "allow_targets=[tests.]"]), tmp_path).sharded()
    assert row.verdict == verdict, row
    assert "another order of sums" in row.detail


class Remembering(GPT):
    """A model whose state has more than tensors."""

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 1}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


def test_a_model_that_cannot_be_exported_fails_that_check(
    tmp_path: Path, in_warm_processes: Callable[[Any], None]
) -> None:
    in_warm_processes(nullcontext)
    target = "model._target_=tests.integration.test_certify.Remembering", "allow_targets=[tests.]"
    run_dir = frozen(tmp_path / "run", *TINY_GPT, "model.vocab_size=256", "trainer.device=cpu", *target)
    row = Checks(parse([str(run_dir.path), "steps=2", target[1]]), tmp_path).exported()
    assert row.verdict == "FAILED"
    assert row.detail.endswith("model: _extra_state is a dict, but safetensors files contain only tensors")


def test_a_model_passes_all_checks(
    tmp_path: Path, in_warm_processes: Callable[[Any], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """The runs use processes that exist already; the test of README starts the command with processes of its own."""
    in_warm_processes(nullcontext)
    run_dir = frozen(
        tmp_path / "run", *TINY_GPT, "model.vocab_size=256", "trainer.steps=50", "trainer.device=cpu"
    )
    before = sorted(run_dir.path.iterdir())
    assert main([str(run_dir.path)]) == 0
    certificate = json.loads((run_dir.path / "certificate.json").read_text())
    assert [(row["check"], row["verdict"]) for row in certificate["rows"]] == [(row, "ok") for row in ROWS]
    assert all(row["difference"] <= row["tolerance"] for row in certificate["rows"])
    assert certificate["config_sha256"] == run_dir.meta["config_sha256"]
    assert certificate["versions"]["torch"] == torch.__version__
    assert [line.split(": ")[0] for line in capsys.readouterr().out.splitlines()[:5]] == ROWS
    assert sorted(run_dir.path.iterdir()) == sorted([*before, run_dir.path / "certificate.json"])
