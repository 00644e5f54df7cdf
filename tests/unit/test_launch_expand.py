"""Expansion of a sweep's command line. What is expected is what Hydra's own multirun makes of the same arguments."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from launch.sweeps.advice import one_run_instead
from launch.sweeps.config import LaunchConfig, SweepConfig
from launch.sweeps.directory import plan_jobs
from launch.sweeps.expand import Plan, change_launch, expand
from tests.makers import composed, freeze, make_run_dir
from trainer.config.averages import settle_averages
from trainer.config.compose import compose, drive, to_config
from trainer.config.schema import Config
from trainer.errors import ConfigError


def many(*arguments: str) -> Plan:
    return expand(["-m", *arguments])


def test_grids_choices_ranges_and_globs_are_hydras_in_hydras_order():
    plan = many("seed=range(2)", "ema.type=choice(constant,warmup)", "trainer.steps=7,9", "model.n_head=2")
    assert [run.overrides[:3] for run in plan.runs] == [
        [f"seed={seed}", f"ema.type={kind}", f"trainer.steps={steps}"]
        for seed in (0, 1)
        for kind in ("constant", "warmup")
        for steps in (7, 9)
    ]
    assert all(run.overrides[3:] == ["model.n_head=2"] for run in plan.runs)
    last = plan.runs[-1].config
    assert (last.seed, last.ema.type, last.trainer.steps, last.model["n_head"]) == (1, "warmup", 9, 2)
    groups = [run.overrides[0] for run in many("ema=glob(*,exclude=m*)").runs]
    names = [
        "axis",
        "bank",
        "constant",
        "cosine",
        "fraction",
        "halflife",
        "off",
        "posthoc",
        "power",
        "warmup",
    ]
    assert groups == [f"ema={name}" for name in names]


def test_each_run_is_what_its_overrides_compose_to_alone():
    arguments = [
        "experiment=quickstart,digits_noise",
        "ema=constant,warmup",
        "optimizer.lr=0.1,0.2",
        "+model.x=3",
    ]
    plan = many(*arguments, "launch.slots=3")
    assert len(plan.runs) == 8 and plan.launch.slots == 3
    for run in plan.runs:
        assert not any(override.startswith("launch") for override in run.overrides)
        assert run.config == to_config(compose(run.overrides)[0])


def test_a_decay_clears_the_banks_of_every_run_as_on_one_command_line():
    plan = many("experiment=quickstart", "ema.decay=0.9,0.99")
    assert [list(settle_averages(run.config)) for run in plan.runs] == [["0.9"], ["0.99"]]


def test_a_grid_written_in_a_file_counts_like_a_typed_one(tmp_path: Path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "grid.yaml").write_text(
        "# @package _global_\nhydra:\n  sweeper:\n    params:\n      seed: 3,4\n      ema.decay: 0.5\n"
    )
    plan = many(f"--config-dir={tmp_path}", "experiment=grid", "trainer.steps=1,2")
    assert [(run.config.seed, run.config.trainer.steps) for run in plan.runs] == [
        (3, 1),
        (3, 2),
        (4, 1),
        (4, 2),
    ]
    assert all(run.config.ema.decay == 0.5 for run in plan.runs)


def test_one_run_twice_is_refused_also_if_its_value_is_written_in_two_ways():
    with pytest.raises(ConfigError) as refused:
        many("optimizer.lr=1,2,1.0", "seed=1,2")
    assert str(refused.value) == "optimizer.lr: expected each run once, but runs 0 and 4 are the same"


def test_without_the_flag_there_is_one_run_and_many_values_are_refused():
    (run,) = expand(["experiment=quickstart", "seed=3"]).runs
    assert run.config == to_config(compose(["experiment=quickstart", "seed=3"])[0])
    with pytest.raises(ConfigError, match="seed: 1,2 is many values"):
        expand(["seed=1,2"])


def test_the_first_bad_run_is_named():
    with pytest.raises(ConfigError) as refused:
        many("seed=0,1", "ema.decay=0.5,1.5")
    assert str(refused.value).startswith(
        "ema.decay: expected a number in [0, 1], got 1.5 [run 1 of 4 (seed=0 "
    )


def test_typed_targets_are_trusted_and_the_group_is_frozen_but_what_is_asked_for_stays():
    (run, _) = many("ema.rule=my.rule", "allow_targets=[mine.]", "seed=0,1").runs
    assert sorted(run.allowed) == ["mine.", "my.rule"]
    assert OmegaConf.create(run.frozen("a_sweep")).logger.group == "a_sweep"
    assert OmegaConf.create(run.frozen("a_sweep")).allow_targets == []
    (own, _) = many("logger.group=mine", "seed=0,1").runs
    assert OmegaConf.create(own.frozen("a_sweep")).logger.group == "mine"


def test_a_fork_of_a_run_with_own_code_is_refused_before_a_job_starts(tmp_path: Path):
    config = composed("+metrics.mine._target_=own.mine", "callbacks={one: {_target_: own.One}}")
    fork = f"fork={make_run_dir(tmp_path / 'run', freeze(config)).path}@8"
    with pytest.raises(ConfigError) as refused:
        many(fork, "trainer.steps=10", "seed=1,2")
    keys, _, words = str(refused.value).partition(": not allowed by this command line; ")
    assert keys == "metrics.mine._target_, callbacks.one._target_"
    assert "'allow_targets=[own.mine,own.One]' [run 0 of 2 " in words
    assert len(many(fork, "trainer.steps=10", "seed=1,2", "allow_targets=[own.mine,own.One]").runs) == 2
    with pytest.raises(ConfigError, match=r"callbacks\.one\._target_: not allowed"):
        many(fork, "seed=1,2", "allow_targets=[own.mine]")


def test_directories_are_named_after_what_differs():
    jobs = plan_jobs(
        many("experiment=quickstart", "ema.decay=0.9,0.99", "optimizer.lr=1e-3,1e-4", "seed=5").runs
    )
    assert [job.run_dir for job in jobs][:2] == ["0_decay_0.9_lr_0.001", "1_decay_0.9_lr_0.0001"]
    assert jobs[0].differs == "ema.decay=0.9 optimizer.lr=0.001"
    alike = plan_jobs(many("+model.a.x=1,2", "+data.a.x=1,2").runs)
    assert alike[1].run_dir == "1_model.a.x_1_data.a.x_2"
    assert [job.run_dir for job in plan_jobs(expand(["seed=3"]).runs)] == ["0"]


def command(bank: str | None) -> Config:
    """The run of a printed command."""
    assert bank is not None
    words = shlex.split(bank)
    assert words[:3] == ["python", "-m", "trainer"]
    return to_config(compose(words[3:])[0])


@pytest.mark.parametrize(
    "arguments",
    [
        ["experiment=quickstart", "ema.decay=0.9,0.99,0.999", "seed=4"],
        ["ema=warmup", "ema.decay=0.9,0.99"],
        ["ema=constant,power,halflife"],
        ["ema=constant", "ema.start_iter=0,100", "ema.decay=0.9,0.5"],
        ["ema=power", "ema.gamma=6.94,16.97"],
        ["ema.dtype=float32,null", "experiment=quickstart", "ema.decay=0.9"],
    ],
    ids=["decays", "warm-up", "groups", "two fields", "gammas", "dtypes"],
)
def test_a_sweep_of_averages_alone_is_one_run_with_a_bank_of_the_same_averages(arguments):
    runs = many(*arguments).runs
    bank = command(one_run_instead(runs, LaunchConfig()))
    wanted = [average for run in runs for average in settle_averages(run.config).values()]
    relevant = {
        "constant": ("decay",),
        "warmup": ("decay",),
        "power": ("gamma",),
        "halflife": ("halflife_kimg",),
    }
    for got, average in zip(settle_averages(bank).values(), wanted, strict=True):
        for name in ("type", "start_iter", "dtype", "mode", "update_every", *relevant[average.type]):
            assert getattr(got, name) == getattr(average, name), name
    assert bank.seed == runs[0].config.seed and bank.model == runs[0].config.model


@pytest.mark.parametrize(
    "arguments",
    [
        ["ema.decay=0.9,0.99", "seed=0,1"],
        ["optimizer.lr=0.1,0.2"],
        ["ema=bank,constant"],
        ["ema=off,constant"],
        ["ema.decay=0.9"],
    ],
)
def test_a_sweep_of_more_than_averages_is_not_one_run(arguments):
    assert one_run_instead(many(*arguments).runs, LaunchConfig()) is None


def test_retry_changes_single_keys_or_chooses_anew():
    before = LaunchConfig(processes_per_node=2, slots=3)
    assert change_launch(before, ["launch.slots=1"]) == LaunchConfig(processes_per_node=2, slots=1)
    assert change_launch(before, ["launch=print"]) == LaunchConfig(name="print")
    for wrong in ("++launch.zz=1", "launch.slots=0", "launch.slot=1", "launch=nowhere", "launch.slots=many"):
        with pytest.raises(ConfigError, match="launch"):
            change_launch(before, [wrong])


def test_hydras_own_composition_of_the_primary_file_agrees():
    arguments = ["launch=print", "sweep_dir=here", "experiment=quickstart", "trainer.steps=7"]
    cfg = drive(arguments, "sweep", lambda cfg: cfg, kind=SweepConfig)
    plan = expand(arguments)
    assert (cfg.launch.name, cfg.sweep_dir) == (plan.launch.name, plan.sweep_dir) == ("print", "here")
    assert cfg.trainer == plan.runs[0].config.trainer and cfg.trainer.steps == 7


def test_torch_is_imported_for_no_look_from_outside(tmp_path: Path):
    code = "import sys, launch.__main__, launch.status, launch.retry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, check=False).returncode == 0
