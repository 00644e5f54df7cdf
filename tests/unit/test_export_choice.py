"""Which weights of which checkpoint are exported. Best steps are read off the evaluations that each test writes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch.export import parse
from launch.export_choice import Options, average_of, best_step
from trainer.compose import freeze_config
from trainer.config import Config, ConfigError
from trainer.report.read import Run, read_run
from trainer.rundir import RunDir


def run_of(tmp_path: Path, losses: dict[int, float | None], **meta: object) -> Run:
    made = RunDir.create(
        tmp_path / "run",
        config_yaml=freeze_config(Config()),
        overrides=[],
        meta={"git": None, "primary_metric": "loss", "higher_is_better": [], **meta},
    )
    metric = str(meta.get("primary_metric", "loss"))
    lines = (
        json.dumps({"train/step": step, f"eval/ema/0.9/{metric}": loss, f"eval/live/{metric}": step})
        for step, loss in losses.items()
    )
    made.metrics_path.write_text("".join(f"{line}\n" for line in lines))
    return read_run(made.path)


def asked(run: Run, *arguments: str) -> Options:
    return parse([str(run.path), "out=m.safetensors", *arguments])


def test_names_of_weights() -> None:
    assert average_of("live", ["0.9"]) is None
    assert average_of("ema/0.9", ["0.9", "0.99"]) == "0.9"
    assert average_of("ema", ["power_sigma0.05"]) == "power_sigma0.05"


@pytest.mark.parametrize("weights", ["", "ema", "ema/", "ema/0.90", "0.9", "ema/../0.9", "ema/0.9/x", "Live"])
def test_a_wrong_name_lists_the_right_ones(weights: str) -> None:
    with pytest.raises(ConfigError, match=r"^weights: expected one of live, ema/0\.9, ema/0\.99, got "):
        average_of(weights, ["0.9", "0.99"])


def test_a_run_without_averages_has_live_weights_only() -> None:
    with pytest.raises(ConfigError, match=r"^weights: expected one of live, got ema"):
        average_of("ema", [])


def test_best_is_that_of_the_chosen_weights_by_the_primary_metric(tmp_path: Path) -> None:
    run = run_of(tmp_path, {100: 2.0, 200: 1.0, 300: 1.5, 400: None})
    assert best_step(run, "0.9", [100, 200, 300, 400]) == 200
    assert best_step(run, "live", [100, 200, 300, 400]) == 100


def test_best_is_the_highest_where_more_is_better(tmp_path: Path) -> None:
    run = run_of(
        tmp_path, {100: 0.5, 200: 0.9, 300: 0.7}, primary_metric="accuracy", higher_is_better=["accuracy"]
    )
    assert best_step(run, "0.9", [100, 200, 300]) == 200


def test_of_equally_good_steps_one_that_is_kept_is_best(tmp_path: Path) -> None:
    assert best_step(run_of(tmp_path, {100: 1.0, 200: 1.0, 300: 2.0}), "0.9", [200, 300]) == 200


def test_a_best_step_whose_checkpoint_is_gone_is_refused_with_its_neighbours(tmp_path: Path) -> None:
    run = run_of(tmp_path, {100: 2.0, 200: 1.25, 300: 1.5})
    with pytest.raises(
        ConfigError,
        match=r"^step=best: the best loss of ema/0\.9 \(1\.25\) was at step 200, whose checkpoint is not kept;"
        r" nearest to it: step=150 and step=300 \(1\.5\)$",
    ):
        best_step(run, "0.9", [100, 150, 300, 400])


def test_best_needs_evaluations_and_a_direction(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no evaluation of ema/0\.9 by loss"):
        best_step(run_of(tmp_path, {100: None}), "0.9", [100])
    (tmp_path / "run" / "meta.json").write_text('{"primary_metric": "f1"}')
    with pytest.raises(ConfigError, match="does not say whether more f1 is better"):
        best_step(read_run(tmp_path / "run"), "0.9", [100])


def test_steps_are_words_or_numbers(tmp_path: Path) -> None:
    run = run_of(tmp_path, {})
    assert [asked(run, *more).step for more in ([], ["step=best"], ["step=100"])] == ["last", "best", 100]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["dtype=float8"], "dtype: expected one of stored, float32, bfloat16, float16, got float8"),
        (["wieghts=live"], "wieghts: unknown key; expected weights, out,"),
        (["step=1", "step=2"], "step: expected once, got 1 and 2"),
        (["max_shard_size=lots"], "max_shard_size: expected a size"),
        (["elsewhere"], "expected one run directory, got "),
        (["allow_targets=[a"], r"allow_targets=\[a: quote what is not plain"),
        (["step=new"], "step: expected last, best or a number of steps, got new"),
        (["step=-1"], "step: expected last, best or a number of steps, got -1"),
    ],
)
def test_the_command_line_is_refused_by_key(tmp_path: Path, arguments: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=f"^{expected}"):
        asked(run_of(tmp_path, {}), *arguments)


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^RUN_DIR: .* is no run directory"):
        parse([str(tmp_path), "out=m.safetensors"])


def test_help_and_refusals_answer_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from launch.export import main;"
        "codes = [main(['--help']), main([]), main(['nowhere', 'out=a'])];"
        "sys.exit(str(codes) + str({'torch', 'safetensors', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "[0, 2, 2]set()"
    assert done.stdout.startswith("Write the weights of a run")
