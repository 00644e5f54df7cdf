"""What wandb and TensorBoard are told of real runs, read from the files that they wrote: a sweep, and its runs resumed.

The reference are each run's own `metrics.jsonl` and the files of its report.
"""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.forked import WITHOUT_PICTURES
from tests.integration.commands import command, records, run_to_end, trainer
from tests.wandb_file import WandbRun

KEY = "0123456789abcdef0123456789abcdef01234567"
TINY_FLOW = (
    "experiment=digits_flow",
    "model.depth=1",
    "model.hidden=32",
    "task.sample_steps=2",
    "task.sample_count=4",
    "trainer.steps=4",
    "trainer.log_every=1",
    "trainer.eval_every=1",  # two evaluations are too few for a heat map
    "trainer.global_batch_size=4",
    "trainer.eval_samples=8",
    "trainer.num_threads=1",
    "ema.decays=[]",
    "ema.averages={fast:{decay:0.5},wide:{type:power}}",
)
PICTURES = {"curves", "divergence", "heat_map", "samples"}


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A sweep over two seeds with a login in the environment, and what its driver printed."""
    folder = tmp_path_factory.mktemp("swept")
    words = command(
        "-m", *TINY_FLOW, "seed=1,2", "logger.tags=[a,b]", "sweep_dir=sweeps/mine", module="launch"
    )
    done = run_to_end(words, cwd=folder, extra={"WANDB_API_KEY": KEY, WITHOUT_PICTURES: ""})
    return folder / "sweeps" / "mine", done.stdout


def sessions(run_dir: Path) -> list[WandbRun]:
    """In order of time."""
    return [WandbRun(folder) for folder in sorted((run_dir / "wandb").glob("offline-run-*"))]


def without_infinities(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [dict(sorted((key, value) for key, value in row.items() if value is not None)) for row in found]


def runs_of(sweep: Path) -> list[Path]:
    return [sweep / "0_seed_1", sweep / "1_seed_2"]


def test_every_run_of_a_sweep_is_in_its_group_under_its_own_name_with_its_tags_and_whole_configuration(
    swept: tuple[Path, str],
) -> None:
    found = []
    for run_dir in runs_of(swept[0]):
        (session,) = sessions(run_dir)
        assert (session.run.run_group, session.run.display_name) == ("mine", run_dir.name)
        assert [*session.run.tags] == ["a", "b"] and session.exit_codes == [0]
        assert session.run.run_id == json.loads((run_dir / "meta.json").read_text())["wandb_run_id"]
        config = {key: value for key, value in session.config.items() if key != "_wandb"}
        # Nested, and the frozen one: no path of this session in it, by which equal runs would differ.
        assert config == yaml.safe_load((run_dir / "config.yaml").read_text())
        assert config["ema"]["averages"]["wide"] == {"type": "power"}
        found.append((session.run.run_id, config["seed"]))
    assert [seed for _, seed in found] == [1, 2] and found[0][0] != found[1][0]


def test_every_record_every_picture_and_every_table_of_a_run_is_there(swept: tuple[Path, str]) -> None:
    for run_dir in runs_of(swept[0]):
        (session,) = sessions(run_dir)
        assert session.scalars() == without_infinities(records(run_dir))
        media = session.media()
        pictures = {path.stem for path in (run_dir / "report").glob("*.png")}
        assert pictures >= PICTURES
        assert {key for key, (kind, _, _) in media.items() if kind == "image-file"} == {
            f"report/{name}" for name in pictures
        }
        for key, (kind, step, path) in media.items():
            assert step == 4
            if kind == "image-file":
                assert path.read_bytes() == (run_dir / f"{key}.png").read_bytes()
        kind, _, path = media["report/loss"]
        table = json.loads(path.read_text())
        assert kind == "table-file" and table["columns"][0] == "weights"
        assert [row[0] for row in table["data"]] == ["live", "fast", "wide"]
        assert table["data"][0][1] == records(run_dir)[-1]["eval/live/loss"]


def test_the_summary_has_best_live_best_average_and_the_winning_decay(swept: tuple[Path, str]) -> None:
    for run_dir in runs_of(swept[0]):
        (session,) = sessions(run_dir)
        logged = {record["train/step"]: record for record in records(run_dir)}
        live = min((record["eval/live/loss"], step) for step, record in logged.items())
        best, step, name = min(
            (record[f"eval/ema/{name}/loss"], step, name)
            for step, record in logged.items()
            for name in ("fast", "wide")
        )
        assert {key: value for key, value in session.summary.items() if key.startswith("best/")} == {
            "best/live/loss": live[0],
            "best/live/step": live[1],
            "best/ema/loss": best,
            "best/ema/step": step,
            "best/ema/name": name,
            "best/ema/decay": logged[step][f"ema/{name}/decay"],
        }


def test_no_file_of_the_sweep_holds_the_key(swept: tuple[Path, str]) -> None:
    files = [path for path in swept[0].rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files) and any(path.name == "output.log" for path in files)
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
    assert KEY not in swept[1]


def upload(printed: str) -> list[str]:
    """The words of the last line, which uploads what was logged offline."""
    words = shlex.split(printed.splitlines()[-1])
    assert words[:2] == ["wandb", "sync"]
    return words[2:]


def test_a_resumed_run_goes_on_in_the_same_wandb_run_and_one_line_uploads_all_sessions(
    swept: tuple[Path, str], tmp_path: Path
) -> None:
    assert upload(swept[1]) == ["sweeps/mine/*/wandb/offline-run-*"]
    sweep = Path(shutil.copytree(swept[0], tmp_path / "mine", symlinks=True))
    run_dir, other = runs_of(sweep)
    done = trainer(f"resume={run_dir}", "trainer.steps=6", cwd=tmp_path)
    first, second = sessions(run_dir)
    assert first.run.run_id == second.run.run_id and second.run.display_name == run_dir.name
    assert second.run.run_group == "mine" and second.config["trainer"]["steps"] == 6
    assert first.scalars() + second.scalars() == without_infinities(records(run_dir))
    assert upload(done.stdout) == [str(first.folder), str(second.folder)]
    listed = subprocess.run(
        [sys.executable, "-m", "wandb", "sync", "--dry-run", *upload(done.stdout)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(session.folder.name in listed.stdout + listed.stderr for session in (first, second))
    assert len(sessions(other)) == 1


def test_tensorboard_has_the_same_names(swept: tuple[Path, str], tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    words = command(*TINY_FLOW, "seed=2", "logger=tensorboard", "run_dir=run")
    run_to_end(words, cwd=tmp_path, extra={WITHOUT_PICTURES: ""})
    events = accumulators.EventAccumulator(str(tmp_path / "run" / "tensorboard"), {"tensors": 0, "images": 0})
    events.Reload()
    (session,) = sessions(runs_of(swept[0])[1])
    logged = {key for row in session.scalars() for key in row} - {"train/step"}
    best = {key for key in session.summary if key.startswith("best/")} - {"best/ema/name"}
    assert {*events.Tags()["scalars"]} == logged | best
    pictures = {key for key, (kind, _, _) in session.media().items() if kind == "image-file"}
    assert {*events.Tags()["images"]} == pictures
    tables = {key for key, (kind, _, _) in session.media().items() if kind == "table-file"}
    texts = {tag.removesuffix("/text_summary") for tag in events.Tags()["tensors"]}
    assert texts == tables | {"config", "summary"}
    own = {record["train/step"]: record for record in records(tmp_path / "run")}
    for key in ("train/loss", "eval/live/loss", "eval/ema/wide/loss"):
        found = {event.step: event.value for event in events.Scalars(key)}
        assert found == pytest.approx({step: record[key] for step, record in own.items()}, rel=1e-6)
