"""A sweep on a real Slurm cluster of two virtual nodes, one of its jobs preempted, against one process.

The expected losses are those of one undisturbed process that keeps both averages in a bank.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests import slurm
from tests.integration.commands import REPOSITORY, Warm, environment, last, records, until
from tests.makers import TINY_GPT

pytestmark = [
    pytest.mark.skipif(bool(slurm.missing()), reason=f"no Slurm: {slurm.missing()}"),
    pytest.mark.slow,
]
RUN = (
    "experiment=quickstart",
    *TINY_GPT,
    "trainer.device=cpu",
    "trainer.steps=60",
    "trainer.eval_every=30",
    "trainer.log_every=1",
)
DECAYS = ("0.9", "0.99")
TIMEOUT_S = 240


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    pytest.importorskip("submitit")
    with slurm.cluster() as variables:
        yield environment(variables)


def run(*command: str, env: Mapping[str, str], check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, env=env, cwd=REPOSITORY, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def test_a_preempted_sweep_over_two_nodes_ends_like_one_process(
    cluster: dict[str, str], tmp_path: Path, warm: Warm
) -> None:
    sweep = tmp_path / "sweep"
    started = run(
        *(sys.executable, "-m", "launch", "-m", *RUN, f"ema.decay={','.join(DECAYS)}", "sharding=fsdp"),
        *("launch=slurm", "launch.nodes=2", f"sweep_dir={sweep}"),
        env=cluster,
    )
    assert "2 pending" in started.stdout, "the driver submits and leaves"
    jobs = json.loads((sweep / "sweep.json").read_text())["jobs"]
    run_dirs = [sweep / job["run_dir"] for job in jobs]

    def status() -> str:
        return run(sys.executable, "-m", "launch.status", str(sweep), env=cluster).stdout

    def logs() -> str:
        return status() + "".join(path.read_text()[-2000:] for path in sweep.glob("slurm/*/*.out"))

    until(lambda: len(records(run_dirs[0])) >= 5, logs)
    run("scontrol", "requeue", jobs[0]["handle"], env=cluster)
    queue = ("squeue", "--noheader", f"--jobs={jobs[0]['handle']}", "--format=%T")
    until(lambda: "PENDING" in run(*queue, env=cluster, check=False).stdout, logs)
    assert "1 pending" in status()
    # Slurm would wait two minutes.
    run("scontrol", "update", f"job={jobs[0]['handle']}", "StartTime=now", env=cluster)
    until(lambda: not run("squeue", "--noheader", env=cluster).stdout.strip(), logs)

    assert "2 done" in status(), logs()
    attempts = [json.loads((run_dir / "attempts.json").read_text()) for run_dir in run_dirs]
    assert [len(found) for found in attempts] == [2, 1]
    assert attempts[0][0]["stopped"] and [r["train/step"] for r in records(run_dirs[0])] == list(range(1, 61))

    alone = tmp_path / "alone"
    warm(*RUN, f"ema.decays=[{','.join(DECAYS)}]", f"run_dir={alone}", cwd=REPOSITORY)
    for decay, run_dir in zip(DECAYS, run_dirs, strict=True):
        keys = ["eval/live/loss", f"eval/ema/{decay}/loss"]
        assert last(run_dir, keys) == pytest.approx(last(alone, keys), abs=1e-4)


def test_what_slurm_would_refuse_is_refused_before_anything_is_made(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep"
    command = [sys.executable, "-m", "launch", *RUN, "launch=slurm", f"sweep_dir={sweep}"]
    for override, complaint in (
        ("launch.partition=nowhere", "Invalid partition name"),
        ("launch.nodes=9", "node configuration is not available"),
    ):
        more = ["sharding=fsdp", "trainer.global_batch_size=9"] if "nodes" in override else []
        refused = run(*command, override, *more, env=cluster, check=False)
        assert refused.returncode == 2 and complaint in refused.stderr, refused.stderr
        assert len(refused.stderr.strip().splitlines()) == 1 and not sweep.exists()


def test_without_slurm_the_sweep_is_refused_in_one_line(tmp_path: Path) -> None:
    env = {**environment(), "PATH": os.path.dirname(sys.executable)}
    refused = run(
        *(sys.executable, "-m", "launch", *RUN, "launch=slurm", f"sweep_dir={tmp_path / 'sweep'}"),
        env=env,
        check=False,
    )
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: launch: launch=slurm needs sbatch, which is not on the path; ")
