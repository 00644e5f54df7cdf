"""The command that adds the seeds which a sweep lacks: typed as it is printed, it adds them to the same sweep."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest

from launch import __main__ as launch
from launch.compare import main as compare
from launch.sweeps.backends.local import Local
from launch.sweeps.config import LaunchConfig
from launch.sweeps.directory import Sweep
from launch.sweeps.more_seeds import lacking, more_seeds
from launch.sweeps.outcome import conclude
from tests.sweeps import put
from trainer.report.comparison import Comparison, combine
from trainer.report.runs import find_runs, read_runs

META = {"primary_metric": "loss", "higher_is_better": []}


@pytest.fixture(autouse=True)
def nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Local, "start", lambda *_: True)


def start(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Sweep:
    words = ["-m", "trainer.steps=10", "sweep_dir=mine", "trainer.device=cpu", *arguments]
    monkeypatch.setattr("sys.argv", ["python", *words])
    launch.main(words)
    return Sweep.open("mine")


def evaluated(sweep: Sweep, gaps: Sequence[float] = (0.1, 0.12, 0.08)) -> Comparison:
    """Write evaluations by which a rate of 0.002 is worse, but not clearly.

    Args:
        sweep: Sweep of at most three seeds.
        gaps: Live minus average of each seed.
    """
    for job in sweep.jobs:
        seed = next((int(one[5:]) for one in job.overrides if one.startswith("seed=")), 0)
        live = 2.0 + (0.02, 0.06, 0.03)[seed] * ("optimizer.lr=0.002" in job.overrides)
        record = {"train/step": 10, "eval/live/loss": live, "eval/ema/0.9/loss": live - gaps[seed]}
        record |= {"eval/gap/0.9/loss": gaps[seed], "eval/gap/0.9/loss_se": 0.2}
        (sweep.run_dir(job) / "metrics.jsonl").write_text(json.dumps(record) + "\n")
        (sweep.run_dir(job) / "meta.json").write_text(json.dumps(META))
    comparison = combine(read_runs(find_runs(sweep.path)), "loss")
    assert comparison is not None
    return comparison


def typed(line: str | None) -> list[str]:
    assert line is not None
    words = shlex.split(line)
    assert words[:3] == ["python", "-m", "launch"]
    return words[3:]


def test_the_printed_command_adds_these_seeds_of_every_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = start(
        monkeypatch, "seed=0,1,2", "optimizer.lr=0.001,0.002", "ema.decays=[0.9,0.99]", "launch.slots=1"
    )
    comparison = evaluated(sweep)
    count = lacking(comparison)
    assert 0 < count <= 10
    words = typed(more_seeds(sweep, comparison))
    assert launch.main(words) != 2
    grown = Sweep.open("mine")
    assert len(grown.jobs) == 6 + 2 * count and grown.launch["slots"] == 1
    added = [set(job.overrides) for job in grown.jobs[6:]]
    old = set(sweep.jobs[0].overrides) - {"seed=0", "optimizer.lr=0.001"}
    assert all(old < overrides for overrides in added)
    seeds = [f"seed={seed}" for seed in range(3, 3 + count)]
    assert all(sum(seed in overrides for overrides in added) == 2 for seed in seeds)


def test_a_grown_sweep_and_a_single_seed_get_a_command_too(monkeypatch: pytest.MonkeyPatch) -> None:
    start(monkeypatch, "optimizer.lr=0.001")
    sweep = start(monkeypatch, "optimizer.lr=0.002")
    line = more_seeds(sweep, evaluated(sweep))
    assert typed(line)[-3:] == ["optimizer.lr=0.001,0.002", "seed=1,2", "sweep_dir=mine"]


def test_what_is_settled_or_takes_too_many_seeds_gets_no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = start(monkeypatch, "seed=0,1,2")
    comparison = evaluated(sweep)
    assert comparison.winner is not None and more_seeds(sweep, comparison) is None
    unclear = evaluated(sweep, (0.1, -0.1, 0.01))
    assert unclear.winner is None and more_seeds(sweep, unclear) is None
    few = evaluated(sweep, (0.1, 0.02, 0.01))
    assert few.winner is None and "seed=3" in str(more_seeds(sweep, few))
    for job in sweep.jobs:  # further seeds of a fork share the steps of the same run, whoever named it
        config = {"seed": job.number, "fork": "outputs/base"}
        (sweep.run_dir(job) / "config.yaml").write_text(json.dumps(config))
    assert more_seeds(sweep, evaluated(sweep, (0.1, 0.02, 0.01))) is None


def test_a_record_of_a_stranger_makes_no_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = start(monkeypatch, "optimizer.lr=0.001,0.002")
    comparison = evaluated(sweep)
    assert more_seeds(sweep, comparison) is not None
    monkeypatch.setattr("sys.argv", ["python", "mine"])
    sweep.argv.append("launch.setup=[rm]")
    assert more_seeds(sweep, comparison) is None
    sweep.argv.pop()
    for job in sweep.jobs:
        job.overrides.append("model._target_=os.system")
    assert more_seeds(sweep, comparison) is None
    for job in sweep.jobs:
        job.overrides[-1:] = [f"seed={'9' * 5000}", "=1"]
    assert "seed=1,2" in str(more_seeds(sweep, comparison)), "damaged words are no error"
    for job in sweep.jobs:
        del job.overrides[-2:]
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert more_seeds(sweep, comparison) is None, "the sweep belongs to another working directory"


def test_terminal_compare_and_page_have_the_same_commands_seeds_first_without_a_winner(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = start(monkeypatch, "optimizer.lr=0.001,0.002")
    evaluated(sweep)
    for job in sweep.jobs:
        put(sweep, job.number, exit_code=0)
    assert conclude(sweep, Local(LaunchConfig(name="local", slots=1)), stopped=False, allowed=[]) == 0
    printed = capsys.readouterr().out.partition("Next:\n")[2].splitlines()
    seeds, export = [line.strip() for line in printed if "python -m" in line][:2]
    assert "seed=1,2" in seeds and "launch.export mine/0" in export
    page = (sweep.path / "report" / "index.html").read_text()
    assert page.index(f"<pre>{seeds}</pre>") < page.index(f"<pre>{export}</pre>")
    assert compare(["mine"]) == 0
    shown = capsys.readouterr().out
    assert (
        "Add the seeds that the first open question lacks:\n" in shown
        and f"  {seeds}\nExport the best so far:\n  {export}\n" in shown
    )
    (sweep.path / "sweep.json").write_text("{}")
    assert compare(["mine"]) == 0 and "note: " in capsys.readouterr().out
