"""Which checkpoint and which weights a command means. Best steps are read off the evaluations that each test writes."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.makers import make_run_dir
from trainer.errors import ConfigError
from trainer.rundir.columns import STEP
from trainer.rundir.directory import RunDir
from trainer.weights.selection import choose_checkpoint, choose_one, choose_weights

METRICS = {
    10: {"eval/live/loss": 3.0, "eval/ema/0.9/loss": 1.0},
    20: {"eval/live/loss": 2.5, "eval/ema/0.9/loss": 2.0, "eval/live/accuracy": 0.9},
    30: {"eval/live/loss": 2.2, "eval/ema/0.9/loss": None, "eval/live/accuracy": 0.1},
    40: {"train/loss": 0.5},
}


def write_progress(checkpoint: Path, step: int, averages: list[Any]) -> None:
    """Write the values of a checkpoint."""
    progress = {"step": step, "skipped": 0, "averages": averages}
    (checkpoint / "state.json").write_text(json.dumps({"progress": progress}))


def made(folder: Path, metrics: dict[int, dict[str, Any]], steps: tuple[int, ...] = ()) -> RunDir:
    """A run directory with these records and with committed checkpoints of these steps that hold no tensor."""
    run_dir = make_run_dir(folder / "run", primary_metric="loss", higher_is_better=["accuracy"])
    lines = [json.dumps({STEP: step, **record}) + "\n" for step, record in metrics.items()]
    run_dir.metrics_path.write_text("".join(lines))
    files = {name: {"bytes": 0, "crc32": 0} for name in (".metadata", "state.json")}
    for step in steps:
        path = run_dir.checkpoints / f"step-{step:08d}"
        path.mkdir(parents=True)
        write_progress(path, step, ["0.9", "late"])
        (path / "COMMIT.json").write_text(json.dumps({"files": files}))
    return run_dir


def test_last_and_numbers_are_committed_checkpoints(tmp_path: Path) -> None:
    run_dir = made(tmp_path, METRICS, steps=(20, 30, 40))
    (run_dir.checkpoints / "step-00000050").mkdir()  # never committed
    last = choose_checkpoint(run_dir, "last")
    assert (last.path, last.step, last.note) == (run_dir.checkpoints / "step-00000040", 40, None)
    assert choose_checkpoint(run_dir, 20).step == 20
    for missing in (10, 50):
        with pytest.raises(ConfigError, match=f"no checkpoint of step {missing}; .* steps 20, 30, 40"):
            choose_checkpoint(run_dir, missing)


def test_best_is_that_of_the_chosen_weights_by_the_primary_metric(tmp_path: Path) -> None:
    run_dir = made(tmp_path, METRICS, steps=(10, 20, 30, 40))
    for weights, step, named in (
        ("*", 10, "*"),
        ("ema/0.9", 10, "ema/0.9"),
        ("live", 30, "live"),
        ("best", 10, "ema/0.9"),
    ):
        chosen = choose_checkpoint(run_dir, "best", [weights])
        assert (chosen.step, chosen.patterns, chosen.note) == (step, [named], None)
    run_dir.update_meta(primary_metric="accuracy")  # of which more is better
    assert choose_checkpoint(run_dir, "best").step == 20
    run_dir.update_meta(higher_is_better=[])
    assert choose_checkpoint(run_dir, "best").step == 30


def test_best_is_of_the_checkpoints_that_are_kept_and_says_what_was_better(tmp_path: Path) -> None:
    run_dir = made(tmp_path, METRICS, steps=(20, 30, 40))
    of_average = choose_checkpoint(run_dir, "best", ["ema/0.9"])
    assert (of_average.step, of_average.note) == (
        20,
        "step=best: step 20 (loss 2, ema/0.9) is the best with a checkpoint; step 10 (loss 1, ema/0.9) was better but"
        " has none",
    )
    assert choose_checkpoint(run_dir, "best").step == 20  # an average there beats all of step 30
    both = choose_checkpoint(run_dir, "best", ["live", "best"])
    assert (both.step, both.patterns, both.note) == (20, ["live", "ema/0.9"], of_average.note)
    live = choose_checkpoint(run_dir, "best", ["live"])
    assert (live.step, live.note) == (30, None)


def test_of_equally_good_steps_the_earliest_that_is_kept_is_best(tmp_path: Path) -> None:
    records = {step: {"eval/live/loss": 1.0} for step in (10, 20, 30)}
    chosen = choose_checkpoint(made(tmp_path, records, steps=(20, 30)), "best")
    assert (chosen.step, chosen.note) == (20, None)


def test_best_means_the_averages_of_the_newest_checkpoint_where_they_fit(tmp_path: Path) -> None:
    """The first session kept 0.9 and slow, the second slow alone: `ema` is slow, and 0.9 must be named to be meant."""
    records = {
        step: {"eval/live/loss": 9.0, "eval/ema/0.9/loss": first, "eval/ema/slow/loss": slow}
        for step, first, slow in ((10, 1.0, 3.0), (20, 2.0, 2.5), (30, None, 4.0))
    }
    run_dir = made(tmp_path, records, steps=(10, 20, 30))
    for step, averages in ((10, ["0.9", "slow"]), (20, ["0.9", "slow"]), (30, ["slow"])):
        write_progress(run_dir.checkpoints / f"step-{step:08d}", step, averages)
    for weights, step, meant in (("ema", 20, "slow"), ("ema/slow", 20, "slow"), ("ema/0.9", 10, "0.9")):
        chosen = choose_checkpoint(run_dir, "best", [weights])
        assert (chosen.step, choose_one(weights, chosen.averages)) == (step, f"ema/{meant}")
    assert choose_checkpoint(run_dir, "best").step == 20  # of all that the run still keeps
    both = choose_checkpoint(run_dir, "best", ["best"])  # the best cell of the table, which has all sessions
    assert (both.step, both.patterns) == (10, ["ema/0.9"])
    assert choose_checkpoint(run_dir, 20).averages == ["0.9", "slow"]


@pytest.mark.parametrize(
    ("weights", "told"), [("*", "live or ema/0.9 or ema/late"), ("ema/late", "ema/late")]
)
def test_best_needs_a_checkpoint_at_which_the_weights_were_evaluated(
    tmp_path: Path, weights: str, told: str
) -> None:
    run_dir = made(tmp_path, METRICS, steps=(40,))
    asked = f"step=best: expected a checkpoint at whose step {told} was evaluated by loss"
    expected = f"{asked}; checkpoints exist for step 40"
    with pytest.raises(ConfigError, match=f"^{re.escape(expected)}$"):
        choose_checkpoint(run_dir, "best", [weights])


def test_best_needs_a_direction(tmp_path: Path) -> None:
    run_dir = made(tmp_path, {10: {"eval/live/f1": 1.0}}, steps=(10,))
    run_dir.update_meta(primary_metric="f1", higher_is_better=None)
    with pytest.raises(
        ConfigError, match=r"^step=best: .*meta\.json does not declare whether a higher f1 is better"
    ):
        choose_checkpoint(run_dir, "best")


def test_a_run_without_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no checkpoint yet"):
        choose_checkpoint(made(tmp_path, METRICS), "last")


@pytest.mark.parametrize(("step", "averages"), [(10, [3]), (11, ["0.9"])])
def test_a_checkpoint_without_names_of_averages_or_of_another_step_is_named(
    step: int, averages: list[Any], tmp_path: Path
) -> None:
    run_dir = made(tmp_path, METRICS, steps=(10,))
    path = choose_checkpoint(run_dir, "last").path
    write_progress(path, step, averages)
    with pytest.raises(ConfigError, match=f"{path / 'state.json'}"):
        choose_checkpoint(run_dir, "last")


def test_patterns_keep_the_order_of_the_checkpoint() -> None:
    names = ["0.9", "0.99", "power"]
    assert choose_weights(["*"], names) == ["live", "ema/0.9", "ema/0.99", "ema/power"]
    assert choose_weights(["ema/0.9?", "live"], names) == ["live", "ema/0.99"]
    assert choose_weights(["ema/0.9"], names) == ["ema/0.9"]
    assert choose_weights(["live"], []) == ["live"]


@pytest.mark.parametrize(
    "choose", [choose_one, lambda weights, names: choose_weights(["live", weights], names)]
)
@pytest.mark.parametrize("weights", ["", "ema", "ema/", "ema/0.90", "0.9", "ema/../0.9", "ema/0.9/x", "Live"])
def test_a_wrong_name_is_told_in_one_way_with_the_right_ones(choose: Any, weights: str) -> None:
    expected = f"weights: expected one of live, ema/0.9, ema/0.99, got {weights or 'nothing'}"
    with pytest.raises(ConfigError, match=f"^{re.escape(expected)}$"):
        choose(weights, ["0.9", "0.99"])
    with pytest.raises(ConfigError, match=r"^weights: expected one of live, got ema/\*$"):
        choose("ema/*", [])


def test_ema_alone_is_the_only_average() -> None:
    assert choose_one("ema", ["power_sigma0.05"]) == "ema/power_sigma0.05"
    assert choose_weights(["ema"], ["0.9"]) == ["ema/0.9"]


def test_where_one_is_expected_several_are_refused() -> None:
    assert choose_one("ema/0.9?", ["0.9", "0.99"]) == "ema/0.99"
    with pytest.raises(ConfigError, match=r"^weights: expected one, but ema/\* matches ema/0\.9, ema/0\.99$"):
        choose_one("ema/*", ["0.9", "0.99"])
