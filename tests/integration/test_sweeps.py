"""Sweeps through the real command lines: what is run, what is on record, and what a crash leaves behind."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from launch import compare, retry, status
from tests.integration.commands import TIMEOUT_S, environment, records, run_to_end, until
from tests.makers import TINY_GPT

TINY = (*TINY_GPT, "model.n_layer=1", "model.n_embd=16", "data.max_bytes=50000", "trainer.eval_samples=4")
DECAYS = tuple(f"0.{number}" for number in range(11, 16))
BROKEN = DECAYS[:1]
PARTS = """
from pathlib import Path

class Hold:
    every = 10

    def after_step(self, run):
        gate = Path("gates") / run.run_dir.name.split("_")[0]
        if gate.exists():
            gate.read_bytes()

def flaky(t, config):
    if (Path("broken") / str(config.decay)).exists():
        raise RuntimeError(f"decay {config.decay} is broken")
    return config.decay
"""


def command(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def launch(
    module: str, *arguments: str, cwd: Path, check: bool = True, extra: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command of `launch` to its end."""
    return run_to_end(command(module, *arguments), cwd=cwd, check=check, extra=extra)


@contextmanager
def driver(cwd: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A driver whose lines can be read as they come; it is killed in the end if it still runs."""
    process = subprocess.Popen(
        command("launch", *arguments),
        cwd=cwd,
        env=environment({"PYTHONUNBUFFERED": "1"}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def read_until(process: subprocess.Popen[str], words: Sequence[str]) -> list[str]:
    """Lines of a driver up to as many that begin with each of these words."""
    assert process.stdout is not None
    lines, wanted = [], list(words)
    for line in process.stdout:
        lines.append(line)
        word = line.partition(" ")[0].strip()
        if word in wanted:
            wanted.remove(word)
        if not wanted:
            return lines
    raise AssertionError(f"ended early, missing {wanted}: {''.join(lines)}")


def jobs(sweep: Path) -> list[dict[str, Any]]:
    return json.loads((sweep / "sweep.json").read_text())["jobs"]


def states(sweep: Path) -> list[str]:
    return [job["state"] for job in jobs(sweep)]


def fingerprint(run_dir: Path) -> dict[str, tuple[int, int, bytes]]:
    """Inode, time and content of what a second start would replace or extend."""
    names = ("config.yaml", "meta.json", "metrics.jsonl", "attempts.json", "output.log", "report/index.html")
    found = {name: run_dir / name for name in names}
    return {
        name: (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes()) for name, path in found.items()
    }


@contextmanager
def gates(folder: Path, *numbers: int) -> Iterator[list[Path]]:
    """Named pipes at which these runs wait after their tenth step, until `held` or the end of the context."""
    (folder / "gates").mkdir()
    made = [folder / "gates" / str(number) for number in numbers]
    for gate in made:
        os.mkfifo(gate)
    try:
        yield made
    finally:
        for gate in made:
            if gate.exists():
                with suppress(OSError):  # no run is there
                    os.close(_open_to(gate))
                gate.unlink()


@contextmanager
def held(gate: Path) -> Iterator[None]:
    """Wait until the run is at its gate, and release it in the end."""
    opened: list[int] = []

    def is_there() -> bool:
        with suppress(OSError):
            opened.append(_open_to(gate))
        return bool(opened)

    until(is_there, lambda: f"no run came to {gate}")
    gate.unlink()
    try:
        yield
    finally:
        os.close(opened[0])


def _open_to(gate: Path) -> int:
    return os.open(gate, os.O_WRONLY | os.O_NONBLOCK)


HOLD = "+callbacks.hold._target_=my_parts.Hold"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_driver_loses_nothing_and_retry_runs_exactly_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_parts.py").write_text(PARTS)
    (tmp_path / "broken").mkdir()
    for decay in BROKEN:
        (tmp_path / "broken" / decay).touch()
    sweep = tmp_path / "sweep"
    arguments = (
        "-m",
        *TINY,
        "trainer.steps=10",
        "ema.rule=my_parts.flaky",
        HOLD,
        f"ema.decay={','.join(DECAYS)}",
        "launch.slots=2",
        f"sweep_dir={sweep}",
    )
    with gates(tmp_path, 2, 3) as (third, fourth), driver(tmp_path, *arguments) as process:
        read_until(process, ["started", "failed", "started", "done", "started", "started"])
        with held(third), held(fourth):
            process.kill()
            process.wait()
            assert status.main(["sweep"]) == 0
    shown = capsys.readouterr().out
    before = jobs(sweep)
    seen = [job["state"] for job in before]
    assert seen == ["failed", "done", "running", "running", "pending"], "what the driver had started lives on"
    for job in before:
        decay = DECAYS[job["number"]]
        line = next(line for line in shown.splitlines() if job["run_dir"] in line)
        assert line.startswith(job["state"])
        if decay in BROKEN:
            assert f"ema.rule: RuntimeError: decay {decay} is broken" in line
    finished = {
        job["run_dir"]: fingerprint(sweep / job["run_dir"]) for job in before if job["state"] == "done"
    }
    frozen = {job["run_dir"]: (sweep / job["run_dir"] / "config.yaml").stat() for job in before}

    for decay in BROKEN:
        (tmp_path / "broken" / decay).unlink()
    assert retry.main(["sweep"]) == 2
    again = capsys.readouterr().err.rpartition("python -m launch.retry ")[2].split()
    assert again == ["sweep", "'allow_targets=[my_parts.Hold,my_parts.flaky]'"]
    retried = launch("launch.retry", "sweep", "allow_targets=[my_parts.]", cwd=tmp_path).stdout
    missing = {job["run_dir"] for job in before if job["state"] in ("failed", "pending")}
    assert set(re.findall(r"^started +(\S+)", retried, re.MULTILINE)) == missing
    assert "5 runs: 5 done" in retried and f"report: {sweep / 'report' / 'index.html'}" in retried

    after = jobs(sweep)
    assert [job["state"] for job in after] == ["done"] * 5
    assert [job["attempts"] for job in after] == [1 + (decay in BROKEN) for decay in DECAYS]
    assert {name: fingerprint(sweep / name) for name in finished} == finished
    for job in after:
        stat = (sweep / job["run_dir"] / "config.yaml").stat()
        assert (stat.st_ino, stat.st_mtime_ns) == (
            frozen[job["run_dir"]].st_ino,
            frozen[job["run_dir"]].st_mtime_ns,
        )
        assert [record["train/step"] for record in records(sweep / job["run_dir"])][-1:] == [10]
    assert retry.main(["sweep", "allow_targets=[my_parts.]"]) == 0
    assert "started" not in capsys.readouterr().out
    assert compare.main(["sweep"]) == 0
    assert "5 runs, 1 seed: loss" in capsys.readouterr().out
    assert not [path for path in tmp_path.rglob("*") if path.name in (".hydra", "multirun", "multirun.yaml")]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ctrl_c_stops_all_runs_saved_and_retry_goes_on_from_there(tmp_path: Path) -> None:
    (tmp_path / "my_parts.py").write_text(PARTS)
    long = (*TINY, "trainer.steps=200", "trainer.eval_every=200", "trainer.log_every=10", HOLD)
    arguments = ("-m", *long, "seed=0,1,2", "launch.slots=2", "sweep_dir=sweep")
    sweep = tmp_path / "sweep"
    with gates(tmp_path, 0, 1) as (first, second), driver(tmp_path, *arguments) as process:
        with held(first), held(second):
            process.send_signal(signal.SIGINT)
            read_until(process, ["started", "started", "SIGINT:"])
        rest, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 75, rest
    assert len(re.findall("^stopped  ", rest, re.MULTILINE)) == 2 and "started" not in rest
    assert "python -m launch.retry sweep" in rest.rpartition("continue with:")[2]
    assert states(sweep) == ["pending"] * 3
    reached = [job["step"] for job in jobs(sweep)]
    assert reached[0] > 0 and reached[1] > 0 and reached[2] == 0
    launch("launch.retry", "sweep", "allow_targets=[my_parts.]", cwd=tmp_path)
    assert states(sweep) == ["done"] * 3
    for job, step in zip(jobs(sweep), reached, strict=True):
        log = (sweep / job["run_dir"] / "output.log").read_text()
        resumed = re.search(r"continues from step (\d+)", log)
        assert (resumed is not None) == (step > 0)
        # Every tenth step is on record; the save is of the very step at which the signal came.
        assert resumed is None or step <= int(resumed[1]) < step + 10


@pytest.mark.slow
def test_one_run_in_two_processes_is_started_by_torchrun(tmp_path: Path) -> None:
    done = launch(
        "launch",
        *TINY,
        "trainer.steps=3",
        "sharding=fsdp",
        "launch.processes_per_node=2",
        "sweep_dir=sweep",
        cwd=tmp_path,
    )
    (job,) = jobs(tmp_path / "sweep")
    assert job["state"] == "done" and "1 run: 1 done" in done.stdout
    meta = json.loads((tmp_path / "sweep" / job["run_dir"] / "meta.json").read_text())
    assert (meta["world_size"], meta["primary_metric"]) == (2, "loss")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["-m", "seed=0,1", "ema.decay=0.9,1.5"], "ema.decay: expected a number in [0, 1]"),
        (["-m", "trainer.steps=5,1e3"], "trainer.steps: expected an integer"),
        (["-m", "ema=constant,nothing"], "ema: no choice 'nothing'"),
        (["-m", "seed=0,1", "launch.processes_per_node=2"], "sharding.strategy: 'none' is for one process"),
        (["-m", "seed=0,1", "launch.slots=0"], "launch.slots: expected at least 1"),
        (["-m", "seed=0,1", "launch.nodes=2", "sharding=ddp"], "launch.nodes: expected 1, got 2"),
        (["-m", "launch.slots=1,2"], "launch: one sweep is started in one way"),
        (["-m", "seed=0,1", "run_dir=here"], "run_dir: "),
        (["-m", "seed=0,1", "ema.decay=0.9", "sweep_dir=taken"], "exists already"),
        (["ema.decay=0.9,0.99"], "python -m launch -m ema.decay=0.9,0.99"),
        (["resume=somewhere"], "python -m launch.retry"),
    ],
)
def test_one_bad_run_stops_all_before_anything_is_made(
    tmp_path: Path, arguments: list[str], named: str
) -> None:
    (tmp_path / "taken").mkdir()
    done = launch("launch", *TINY, *arguments, cwd=tmp_path, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if not line.startswith("note: ")]
    assert len(errors) == 1 and errors[0].startswith("error: ") and named in errors[0], errors
    assert done.stdout == "" and [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_print_shows_commands_that_need_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    done = launch("launch", "-m", *TINY, "seed=range(2)", "ema.decay=0.9,0.99", "launch=print", cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert len(lines) == 4 and not list(tmp_path.iterdir())
    assert [re.findall(r"seed=\d|ema\.decay=\S+|[0-3]_seed_\d_decay_\S+", line) for line in lines] == [
        ["seed=0", "ema.decay=0.9", "0_seed_0_decay_0.9"],
        ["seed=0", "ema.decay=0.99", "1_seed_0_decay_0.99"],
        ["seed=1", "ema.decay=0.9", "2_seed_1_decay_0.9"],
        ["seed=1", "ema.decay=0.99", "3_seed_1_decay_0.99"],
    ]
    import shlex

    first = shlex.split(lines[0])
    assert first[:3] == ["python", "-m", "trainer"]
    composed = launch("trainer", *first[3:], "--cfg", "job", cwd=tmp_path).stdout
    assert "decay: 0.9\n" in composed and "group: 20" in composed


@pytest.mark.parametrize("module", ["launch", "launch.status", "launch.retry"])
def test_help_has_two_examples(tmp_path: Path, module: str) -> None:
    printed = launch(module, "--help", cwd=tmp_path).stdout
    assert len(re.findall(rf"^ +(?:watch )?python -m {re.escape(module)} ", printed, re.MULTILINE)) == 2
