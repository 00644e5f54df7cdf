"""`python -m launch.compare`. Means and deviations are those of the numbers in the test, by hand."""

import csv
import json
import math
import re
from pathlib import Path

import pytest

from launch.compare import main
from tests import one_run
from tests.many_runs import compared, make_run, read, sweep
from trainer.report.best_decay import optimum
from trainer.report.comparison import combine_all
from trainer.report.naming import group_runs
from trainer.report.text.comparison_table import combined_table, settings_table


def test_seeds_are_averaged_and_what_differs_names_the_groups(tmp_path: Path) -> None:
    found = compared(read(sweep(tmp_path)))
    assert [group.name for group in found.groups] == ["optimizer.lr=0.1", "optimizer.lr=0.2"]
    (live, average), (single_live, single) = found.rows
    assert (live.weights, live.seeds, average.seeds, single.seeds) == ("live", 2, 2, 1)
    assert (live.last.value, live.last.sd) == (pytest.approx(2.1), pytest.approx(0.02**0.5))
    # Gaps 0.5 and 0.7: mean 0.6, standard deviation sqrt(0.02), standard error sqrt(0.02 / 2) = 0.1, one degree of
    # freedom, whose t for 95 % is 12.706.
    gap = average.last.gap
    assert gap is not None and (gap.mean, gap.se, gap.df) == (pytest.approx(0.6), pytest.approx(0.1), 1)
    assert gap.interval == pytest.approx((0.6 - 1.2706, 0.6 + 1.2706), abs=1e-4)
    assert single.last.gap is not None and single.last.sd is None
    assert (single.last.gap.mean, single.last.gap.se) == (pytest.approx(0.1), 0.01)
    assert (average.last.verdict, single.last.verdict) == ("no clear difference", "better")
    assert single_live.last.value == 1.9


def test_one_seed_a_group_names_no_best_of_all(tmp_path: Path) -> None:
    found = compared(read(sweep(tmp_path)))
    assert found.winner is None
    assert found.headline == (
        "Best setting by loss (lower is better): not clear; lr=0.1, 1.5000 ± 0 with EMA 0.9 leads,"
        " but one seed shows no spread over seeds, so it may be chance."
    )


def test_runs_of_different_tasks_data_or_units_are_not_ranked(tmp_path: Path) -> None:
    for name, task, data, unit in (("0", "a.A", "x", "m"), ("1", "b.B", "x", "m"), ("2", "a.A", "y", "m")):
        meta = json.dumps({"metric_units": {"loss": unit}})
        make_run(tmp_path / name, 2, 1, f"task._target_={task}", f"data._target_={data}", "seed=0", meta=meta)
    make_run(
        tmp_path / "3", 2, 1, "task._target_=a.A", "data._target_=x", "seed=1", meta='{"metric_units": 3}'
    )
    make_run(tmp_path / "4", 2, 1, "task._target_=a.A", "data._target_=x", "seed=2", meta=meta)
    found = combine_all(read(tmp_path))
    assert [[run.name for run in only.groups[0].runs] for (only,) in found] == [
        ["0", "4"],
        ["1"],
        ["2"],
        ["3"],
    ]


def test_decays_swept_over_runs_are_averages_of_one_training(tmp_path: Path) -> None:
    for number, decay in enumerate(("0.9", "0.99")):
        for seed in "01":
            run_dir = make_run(
                tmp_path / f"{number}{seed}", 2.0, 1.5 + number, f"ema.decay={decay}", f"seed={seed}"
            )
            text = (run_dir / "metrics.jsonl").read_text()
            (run_dir / "metrics.jsonl").write_text(text.replace("/0.9/", f"/{decay}/"))
    (group,) = group_runs(read(tmp_path))
    assert (group.name, group.seeds, group.averages) == ("all runs", ["0", "1"], ["0.9", "0.99"])
    # Two runs of one seed are one sample of the live weights.
    assert [row.seeds for row in compared(read(tmp_path)).rows[0]] == [2, 2, 2]


@pytest.mark.parametrize(
    ("gaps", "variance", "df", "wins"),
    [
        # Over the runs alone t is 10 sqrt(3), so p is 0.0033; with the samples it is 0.00001.
        ((0.11, 0.09, 0.1), 0.0001 / 3, 2, True),
        # Over the runs alone the difference seems as clear, but it is the noise of the samples that they share.
        ((0.011, 0.009, 0.01), 0.0001 + 0.000001 / 3, 8, False),
        ((0.1, -0.09, 0.05), 0.0001 + 0.0097 / 3, 2, False),
        ((0.1, 0.1, 0.1), 0.0001, 8, True),
    ],
)
@pytest.mark.parametrize("same", [("fork=base@50", "seed={}"), ("seed=0",)])
def test_runs_of_one_seed_win_if_they_agree_and_their_samples_too(
    same: tuple[str, ...], gaps: tuple[float, ...], variance: float, df: int, wins: bool, tmp_path: Path
) -> None:
    """Forks of one run, or runs of the same seed."""
    for number, gap in enumerate(gaps):
        settings = [text.format(number) for text in same]
        make_run(tmp_path / str(number), 2.0, 2.0 - gap, *settings, "trainer.eval_samples=9")
    found = compared(read(tmp_path))
    (row,) = [row for row in found.rows[0] if row.weights == "0.9"]
    gap = row.last.gap
    assert gap is not None and (gap.se, gap.df) == (pytest.approx(math.sqrt(variance)), df)
    assert (row.seeds, row.last.sd, row.last.winner) == (1, None, wins)
    assert "would show" not in found.headline
    assert any("over its evaluation samples and its runs" in note for note in combined_table(found).notes)


def test_a_fork_of_nothing_is_none_and_forks_of_many_settings_are_counted(tmp_path: Path) -> None:
    for number in range(14):
        make_run(tmp_path / f"{number:02}", 2, 1.5, f"optimizer.lr={number // 2}", "fork=a", f"seed={number}")
    (note,) = compared(read(tmp_path)).notes
    assert note.endswith(": 00, 01; 02, 03; 04, 05; 06, 07; 08, 09; and those of 2 more settings.")
    for number in range(2):
        make_run(tmp_path / "none" / str(number), 2, 1.5, "fork=null", f"seed={number}")
    whole = compared(read(tmp_path / "none"))
    assert whole.notes == [] and whole.rows[0][0].seeds == 2


def test_numbers_of_a_strangers_settings_are_read_if_a_configuration_could_have_them(tmp_path: Path) -> None:
    keys = ("trainer.steps", "trainer.eval_samples", "ema.update_every")
    make_run(tmp_path / "a", 2.0, 1.5, *(f"{key}={'9' * 5000}" for key in keys))
    (run,) = read(tmp_path)
    assert (run.unfinished, run.eval_samples("loss"), run.update_every("0.9")) == (None, math.inf, 1)
    (tmp_path / "a" / "config.yaml").write_text(f"trainer:\n  steps: 0x{'f' * 5000}\n")
    assert main([str(tmp_path)]) == 2


def test_forks_of_one_run_are_one_seed_and_named(tmp_path: Path) -> None:
    for number, average in enumerate((1.5, 1.6, 1.4)):
        make_run(tmp_path / f"fork_{number}", 2.0, average, "fork=base@50", f"seed={number}")
    found = compared(read(tmp_path))
    live, row = found.rows[0]
    assert (live.seeds, row.seeds, row.last.sd) == (1, 1, None)
    note = "Forks of one run share its steps, so they count as one seed: fork_0, fork_1, fork_2."
    assert found.notes == [note]
    for number in range(3):
        make_run(tmp_path / f"new_{number}", 2.0, 1.5, f"seed={number}")
    both = compared(read(tmp_path))
    assert [rows[0].seeds for rows in both.rows] == [3, 1] and both.notes == [note]


def test_averages_of_one_name_and_two_settings_get_different_names(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 2, 1, "ema.start_iter=0", "seed=0")
    make_run(tmp_path / "b", 2, 1.5, "ema.start_iter=100", "seed=0")
    rows = compared(read(tmp_path)).rows[0]
    assert {row.weights: row.last.value for row in rows} == {
        "live": 2,
        "0.9 (start_iter=0)": 1,
        "0.9 (start_iter=100)": 1.5,
    }


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("ema: {decay: 0.9, decays: [], averages: null}", "ema: {decay: 0.5, decays: [0.9], averages: {}}"),
        ("ema: {averages: {'0.9': {type: power}}}", "ema: {averages: {'0.9': {type: power}, b: {decay: 1}}}"),
        ("ema: {gamma: 1}\ndata: {eval_sets: null}", "ema: {gamma: 1.0}\ndata: {eval_sets: {}}"),
        ("model: {widths: [1, 2.0]}", "model: {widths: [1.0, 2]}"),
        ("data: {path: a, transforms: null}", "data: {path: a}"),
    ],
)
def test_values_that_mean_the_same_are_one_setting(tmp_path: Path, first: str, second: str) -> None:
    for seed, config in enumerate((first, second)):
        run = make_run(tmp_path / str(seed), 2 - seed, 1)
        (run / "config.yaml").write_text(f"{config}\nseed: {seed}\n")
    (rows,) = compared(read(tmp_path)).rows
    assert [(row.weights, row.seeds) for row in rows] == [("live", 2), ("0.9", 2)]


def test_a_key_that_only_some_runs_set_is_shown_as_missing_from_the_others(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 2, 1, "+model.x=1")
    make_run(tmp_path / "b", 2, 1, "seed=3")
    assert [group.name for group in group_runs(read(tmp_path))] == ["model.x=1", "model.x=(none)"]


def test_groups_are_ordered_by_their_numbers(tmp_path: Path) -> None:
    for name in ("10", "9", "1e-3"):
        make_run(tmp_path / name, 2, 1, f"optimizer.lr={name}")
    names = [group.name for group in group_runs(read(tmp_path))]
    assert names == ["optimizer.lr=1e-3", "optimizer.lr=9", "optimizer.lr=10"]


def test_groups_are_named_by_the_fewest_settings_that_distinguish_them(tmp_path: Path) -> None:
    for number in range(4):
        same = [f"model.key_{n}={'ab'[number > 1] * 20}" for n in range(10)]
        make_run(
            tmp_path / str(number),
            2,
            1,
            f"experiment={'ab'[number > 1]}",
            f"optimizer.lr={number % 2}",
            *same,
        )
    found = compared(read(tmp_path))
    names = [group.name for group in found.groups]
    assert names == [
        f"experiment={name}, optimizer.lr={lr} (and 10 more)" for name, lr in ("a0", "a1", "b0", "b1")
    ]
    where = "And 10 more settings differ between the groups: in runs.csv, and at the end of the page."
    assert where in combined_table(found).notes
    table = settings_table(found)
    assert table is not None and len(table.headers) == 13 and len(table.lines) == 4


def test_a_name_that_ends_like_that_of_an_abridged_group_is_whole(tmp_path: Path) -> None:
    for number in range(2):
        make_run(tmp_path / str(number), 2, 1, f"model.size={number} (and 2 more)")
    whole = compared(read(tmp_path))
    assert settings_table(whole) is None
    assert not any("more setting" in note for note in combined_table(whole).notes)


def test_paths_and_logging_settings_do_not_separate_groups(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 2, 1, "trainer.save_every=10", "logger.name=none", "run_dir=a")
    make_run(tmp_path / "b", 2, 1, "trainer.save_every=20", "logger.name=wandb", "run_dir=b")
    make_run(tmp_path / "c", 2, 1, "trainer.on_checkpoint=rclone copy {path} remote:c")
    assert len(group_runs(read(tmp_path))) == 1


def test_the_configuration_counts_and_not_what_was_typed(tmp_path: Path) -> None:
    for name, typed in (("a", "optimizer=fast"), ("b", "optimizer.lr=0.3")):
        run_dir = make_run(tmp_path / name, 2, 1, typed)
        (run_dir / "config.yaml").write_text(f"seed: {name}\noptimizer:\n  lr: 0.3\n")
    (group,) = group_runs(read(tmp_path))
    assert group.seeds == ["a", "b"]


def test_a_run_that_ended_early_does_not_count_and_is_named(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / str(n), 2.0, 1.0 + n, f"seed={n}") for n in range(3)]
    text = (runs[2] / "metrics.jsonl").read_text()
    (runs[2] / "metrics.jsonl").write_text(text.replace('"train/step": 100', '"train/step": 50'))
    found = compared(read(tmp_path))
    assert [run.name for run in found.groups[0].runs] == ["0", "1"]
    average = found.rows[0][1]
    assert average.best is not None and (average.last.value, average.best.value) == (1.5, 1.5)
    assert found.notes == ["Left out because they ended earlier than other seeds: 2 (step 50 of 100)."]


def test_a_seed_that_diverged_makes_its_line_no_winner(tmp_path: Path) -> None:
    for seed in range(3):
        run_dir = make_run(tmp_path / str(seed), 2.0, 1.0 + 0.01 * seed, f"seed={seed}")
    text = (run_dir / "metrics.jsonl").read_text()
    (run_dir / "metrics.jsonl").write_text(re.sub(r'("eval/(ema|gap)/0.9/loss": )[^,]+', r"\1null", text))
    live, average = compared(read(tmp_path)).rows[0]
    assert math.isnan(average.last.value) and average.last.verdict == "not finite"
    assert not live.last.winner and not average.last.winner


def add_metric(run_dir: Path, name: str, live: float, average: float) -> None:
    record = json.loads((run_dir / "metrics.jsonl").read_text())
    record |= {f"eval/live/{name}": live, f"eval/ema/0.9/{name}": average}
    record |= {f"eval/gap/0.9/{name}": live - average, f"eval/gap/0.9/{name}_se": 0.01}
    (run_dir / "metrics.jsonl").write_text(json.dumps(record) + "\n")


def test_every_metric_is_combined_over_seeds_and_each_other_one_is_a_line_on_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    meta = json.dumps({"higher_is_better": ["accuracy"], "direction_undeclared": ["mine"]})
    for seed in range(3):
        run_dir = make_run(tmp_path / "sweep" / str(seed), 2.0, 1.5 + 0.01 * seed, f"seed={seed}", meta=meta)
        add_metric(run_dir, "accuracy", 0.5, 0.6 + 0.01 * seed)
        add_metric(run_dir, "mine", 7.0, 8.0 + 0.01 * seed)
    assert main([str(tmp_path / "sweep"), f"out={tmp_path / 'out'}"]) == 0
    printed = capsys.readouterr().out
    # Gaps of -0.1, -0.11 and -0.12: mean -0.11, standard error 0.01 / sqrt(3), t of two degrees of freedom 4.303.
    assert re.search(
        r"> accuracy +higher +EMA 0\.9 +0\.6100 +0\.5000 +-0\.110 \[-0\.135, -0\.085\] +0\.0027 +better",
        printed,
    )
    assert re.search(r"\n  mine +no verdict +EMA 0\.9 +8\.0100 +7\.0000 .* different", printed)
    assert printed.count("accuracy") == printed.count(" mine ") == 1
    with (tmp_path / "out" / "table.csv").open() as file:
        rows = {(row["metric"], row["weights"]): row for row in csv.DictReader(file)}
    assert len(rows) == 6 and rows["accuracy", "0.9"]["winner"] == "True"
    assert (rows["mine", "0.9"]["seeds"], rows["mine", "0.9"]["winner"]) == ("3", "False")
    assert "### 3 runs, 3 seeds: mine" in (tmp_path / "out" / "table.md").read_text()
    assert "3 runs, 3 seeds: mine</h2>" in (tmp_path / "out" / "index.html").read_text()


def test_the_line_of_another_metric_shows_its_own_best_average_of_all_groups(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    meta = json.dumps({"higher_is_better": ["accuracy"], "direction_undeclared": ["mine"]})
    for lr, average, accuracy, mine in (("0.1", 1.5, 0.6, 8.0), ("0.2", 1.6, 0.7, 7.0)):
        run_dir = make_run(tmp_path / lr, 2.0, average, f"optimizer.lr={lr}", "seed=0", meta=meta)
        add_metric(run_dir, "accuracy", 0.5, accuracy)
        add_metric(run_dir, "mine", 9.0, mine)
    assert main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"\naccuracy +higher +0\.2 +EMA 0\.9 +0\.7000 +0\.5000", printed)
    # Of no direction, it is the average that is best by the loss.
    assert re.search(r"\nmine +no verdict +0\.1 +EMA 0\.9 +8\.0000 +9\.0000", printed)


def test_a_single_run_is_a_table_of_its_primary_metric_and_a_line_for_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = make_run(tmp_path / "a", 2.0, 1.5)
    add_metric(run_dir, "accuracy", 0.5, 0.6)
    assert main([str(run_dir)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^a: loss\nEMA 0\.9 wins by loss", printed)
    assert re.search(r"\n *accuracy +no verdict +EMA 0\.9 +0\.6000 +0\.5000", printed)


@pytest.mark.parametrize("key", ["seed", "optimizer.lr"])
def test_runs_that_disagree_on_a_direction_have_no_winner_and_say_why(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The runs of one group, or of two."""
    for number, rising in enumerate((["loss", "accuracy"], [])):
        meta = json.dumps({"higher_is_better": rising})
        run_dir = make_run(tmp_path / str(number), 2.0 + 0.001 * number, 1.5, f"{key}={number}", meta=meta)
        add_metric(run_dir, "accuracy", 0.5, 0.6)
    found = compared(read(tmp_path))
    assert (found.higher_is_better, found.winner) == (None, None)
    assert found.headline == "No winner by loss: the runs disagree on whether higher or lower is better."
    assert main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "The runs disagree on the direction. live - EMA shows which is higher" in printed
    assert re.search(r"\n *accuracy +runs disagree +", printed)
    assert "declared" not in printed


def test_settings_of_one_ending_keep_the_part_in_which_they_differ(tmp_path: Path) -> None:
    for number in range(2):
        make_run(
            tmp_path / str(number), 2, 1, f"model.a.dim={number}", f"model.b.dim={number}", f"seed={number}"
        )
    assert [group.short_name for group in group_runs(read(tmp_path))] == [
        "a.dim=0, b.dim=0",
        "a.dim=1, b.dim=1",
    ]


def test_a_run_that_was_extended_counts_with_its_new_length(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in range(3):
        run_dir = make_run(tmp_path / str(seed), 2.0, 1.5 + 0.01 * seed)
        (run_dir / "config.yaml").write_text(f"seed: {seed}\ntrainer:\n  steps: 100\n")
    session = {"overrides": ["trainer.steps=200"], "config": "seed: 2\ntrainer:\n  steps: 200\n"}
    (run_dir / "meta.json").write_text(json.dumps({"resumed": [session]}))
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"train/step": 200, "eval/live/loss": 1.4, "eval/ema/0.9/loss": 1.3}\n')
    assert main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"\n *100 +live +2 +100 +2\.0000", printed), "steps, weights, seeds, last step, value"
    assert re.search(r"\n *200 +live +1 +200 +1\.4000", printed)


@pytest.mark.parametrize("seeds", [1, 2])
def test_the_legend_says_what_the_best_column_is_over_seeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], seeds: int
) -> None:
    for seed in range(seeds):
        run = one_run.make_run(tmp_path / str(seed), sign=1 + seed / 10)
        (run / "config.yaml").write_text(f"seed: {seed}\n")
    assert main([str(tmp_path)]) == 0
    legend = "best: the mean over the seeds of each one's best value, at its own step."
    assert (legend in capsys.readouterr().out) is (seeds == 2)


def test_the_winner_of_each_group_is_shown(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 2.0, 1.5, "optimizer.lr=0.1")
    make_run(tmp_path / "b", 2.0, 2.5, "optimizer.lr=0.2")
    lines = combined_table(compared(read(tmp_path))).lines
    # Setting, weights, value, gap, p, and who is better.
    assert [line.cells[5] for line in lines] == ["-", "wins here", "wins here", "worse"]


def test_an_average_that_one_seed_lacks_has_no_part_in_the_decision(tmp_path: Path) -> None:
    for seed in range(3):
        run_dir = make_run(tmp_path / str(seed), 2.0, 1.5 + 0.01 * seed, f"seed={seed}")
    text = (run_dir / "metrics.jsonl").read_text()
    more = {"eval/ema/0.99/loss": 0.1, "eval/gap/0.99/loss": 1.9, "eval/gap/0.99/loss_se": 0.01}
    (run_dir / "metrics.jsonl").write_text(text.replace("}", ", " + json.dumps(more)[1:]))
    found = compared(read(tmp_path))
    assert found.winner is not None and found.winner.weights == "0.9"
    assert (found.rows[0][2].seeds, found.rows[0][2].last.verdict) == (1, "not in every last evaluation")


def test_what_missed_the_last_evaluation_is_nowhere_the_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An average of one seed alone has by far the best value, by the loss and by the accuracy."""
    meta = json.dumps({"higher_is_better": ["accuracy"]})
    for lr, worse in (("0.1", 0.0), ("0.2", 0.5)):
        for seed in range(3):
            live, average = 2.0 + worse, 1.5 + worse + (0.01 + worse / 100) * seed
            overrides = (f"optimizer.lr={lr}", f"seed={seed}")
            run_dir = make_run(tmp_path / f"{lr}_{seed}", live, average, *overrides, meta=meta)
            add_metric(run_dir, "accuracy", 0.5, 0.6 - worse / 10 + 0.01 * seed)
    text = (run_dir / "metrics.jsonl").read_text()
    more = {"eval/ema/0.99/loss": 0.1, "eval/gap/0.99/loss": 2.4}
    more |= {"eval/ema/0.99/accuracy": 0.9, "eval/gap/0.99/accuracy": -0.4}
    (run_dir / "metrics.jsonl").write_text(text.replace("}", ", " + json.dumps(more)[1:]))
    found = compared(read(tmp_path))
    assert found.headline.startswith(
        "Best setting by loss (lower is better): lr=0.1, 1.5100 ± 0.01 with EMA 0.9; the least certain is lr=0.2"
    )
    assert found.ranked() == [0, 1]
    assert main([str(tmp_path)]) == 0
    assert re.search(r"\n[> ]*accuracy +higher +0\.1 +EMA 0\.9 +0\.6100", capsys.readouterr().out)


def test_a_metric_that_only_one_group_has_is_shown_with_its_average_and_group(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Among the runs that have it nothing differs: their group has another name there than in the other table."""
    meta = json.dumps({"higher_is_better": [], "direction_undeclared": ["mine"]})
    for lr, average in (("0.1", 1.5), ("0.2", 1.6)):
        run_dir = make_run(tmp_path / lr, 2.0, average, f"optimizer.lr={lr}", meta=meta)
    add_metric(run_dir, "mine", 9.0, 7.0)
    assert main([str(tmp_path)]) == 0
    assert re.search(
        r"\n *mine +no verdict +0\.2 +EMA 0\.9 +7\.0000 +9\.0000 +\+2\.000", capsys.readouterr().out
    )


def test_the_best_decay_is_none_that_one_seed_alone_has(tmp_path: Path) -> None:
    for seed in range(2):
        run_dir = make_run(tmp_path / str(seed), 2.0, 1.5 + 0.01 * seed, f"seed={seed}")
        record = json.loads((run_dir / "metrics.jsonl").read_text()) | {"ema/0.9/decay": 0.9}
        for name, value in (("0.99", 1.6), ("0.999", 1.7), *([("0.9999", 0.1)] * seed)):
            record |= {f"eval/ema/{name}/loss": value + 0.01 * seed, f"ema/{name}/decay": float(name)}
            record |= {f"eval/gap/{name}/loss": 2.0 - value - 0.01 * seed}
        (run_dir / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    found = compared(read(tmp_path))
    best = optimum(found.groups[0], found.rows[0])
    assert best is not None and best.best == pytest.approx(10)
