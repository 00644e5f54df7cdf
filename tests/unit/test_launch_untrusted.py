"""A sweep's directory may be a stranger's: what it holds is data, and its links lead nowhere."""

import json
from pathlib import Path

import pytest

from launch import retry, status
from launch.sweeps.attempt import attempt
from launch.sweeps.backends import slurm
from launch.sweeps.config import LaunchConfig, check_launch
from launch.sweeps.directory import SWEEP, Sweep
from launch.sweeps.expand import expand
from trainer.errors import ConfigError
from trainer.loggers.jsonl import JsonlLogger
from trainer.rundir.directory import RunDir
from trainer.rundir.lock import held_by

HOSTILE = "comment=x\ntouch pwned\n#"


def record(sweep: Sweep, **launch: object) -> None:
    content = json.loads((sweep.path / SWEEP).read_text())
    content["launch"] |= launch
    (sweep.path / SWEEP).write_text(json.dumps(content))


@pytest.mark.parametrize("field", ["setup", "sbatch"])
def test_nothing_of_what_would_run_code_is_brought_along_by_what_was_typed(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    submitted: list[LaunchConfig] = []
    monkeypatch.setattr(slurm, "_slurm_output", lambda *command, advice: "")
    monkeypatch.setattr(slurm.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(slurm.Slurm, "start", lambda self, *_: bool(submitted.append(self._launch)))
    stranger = {"setup": ["touch pwned"], "sbatch": {"reservation": "theirs"}}
    record(sweep, name="slurm", **stranger)
    assert retry.main(["sweep"]) == 2
    typed = {"setup": "launch.setup=[hostname]", "sbatch": "+launch.sbatch={constraint: h100}"}
    other = {"setup": "launch.sbatch={}", "sbatch": "launch.setup=[]"}[field]
    retry.main(["sweep", typed[field], other])
    (launch,) = submitted
    mine = (
        {"setup": ["hostname"], "sbatch": {}}
        if field == "setup"
        else {"setup": [], "sbatch": {"constraint": "h100"}}
    )
    assert {"setup": launch.setup, "sbatch": launch.sbatch} == mine


@pytest.mark.parametrize("options", [{HOSTILE: True}, {"comment": "a\nb"}, {"comment": ["a"]}, {"-p": "a"}])
def test_options_that_are_more_than_options_are_refused(
    sweep: Sweep, options: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    record(sweep, name="slurm", sbatch=options)
    assert status.main(["sweep"]) == 2
    error = capsys.readouterr().err
    assert "launch.sbatch" in error and error.count("\n") == 1


HOSTILE_VALUES = (
    HOSTILE,
    "x\n#SBATCH --wrap=id",
    'x"\ntouch pwned',
    "x'; touch pwned #",
    "$(touch pwned)",
    "`touch pwned`",
    "a b",
    "x\r",
    "x\x1b[2J",
    "--wrap=id",
    "a\u2028b",
    "",
    "x" * 300,
)


@pytest.mark.parametrize("key", ["partition", "account", "qos"])
def test_a_name_for_slurm_that_is_more_than_a_name_is_refused_when_a_sweep_is_opened_and_made(
    sweep: Sweep, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = expand(["seed=0"]).runs
    for value in HOSTILE_VALUES:
        record(sweep, name="slurm", **{key: value})
        for main in (status.main, retry.main):
            assert main(["sweep"]) == 2, repr(value)
            error = capsys.readouterr().err
            assert error.count("\n") == 1 and f"launch.{key}: expected letters" in error, repr(value)
        with pytest.raises(ConfigError, match=rf"^launch\.{key}: "):
            Sweep.create("new", runs, LaunchConfig(name="slurm", **{key: value}))  # type: ignore[arg-type]
        assert not Path("new").exists() and not Path("pwned").exists(), repr(value)


@pytest.mark.parametrize(
    "option",
    [
        *(
            "wrap",
            "wra",
            "export",
            "export-file",
            "get-user-env",
            "chdir",
            "output",
            "error",
            "input",
            "array",
        ),
        *(
            "prolog",
            "task_prolog",
            "container",
            "bcast",
            "uid",
            "job-name",
            "ntasks",
            "signal",
            "D",
            "o",
            "Wrap",
        ),
    ],
)
def test_an_option_that_runs_code_or_reaches_files_is_refused(option: str) -> None:
    with pytest.raises(ConfigError, match=r"^launch\.sbatch: expected options of resources, queue or mail"):
        check_launch(LaunchConfig(name="slurm", sbatch={option: "x"}))


@pytest.mark.parametrize("options", [{"export": "NONE"}, {"open_mode": "append"}, {"comment": "it's mine"}])
def test_a_sweep_of_an_earlier_version_with_options_refused_now_is_shown_and_goes_on_without_them(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch, options: dict[str, str]
) -> None:
    submitted: list[LaunchConfig] = []
    monkeypatch.setattr(slurm, "_slurm_output", lambda *command, advice: "")
    monkeypatch.setattr(slurm.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(slurm.Slurm, "start", lambda self, *_: bool(submitted.append(self._launch)))
    record(sweep, name="slurm", sbatch=options)
    assert status.main(["sweep"]) == 0
    assert retry.main(["sweep"]) == 2, "recorded options are used only if they are typed"
    assert retry.main(["sweep", f"launch.sbatch={json.dumps(options)}"]) == 2
    assert not submitted
    retry.main(["sweep", "launch.sbatch={}"])
    assert [launch.sbatch for launch in submitted] == [{}]


@pytest.mark.parametrize("value", [*HOSTILE_VALUES[:6], "x" * 600, ["a"], {"a": 1}])
def test_a_value_of_an_option_that_may_be_more_than_a_value_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match=r"^launch\.sbatch\.comment: expected letters") as refused:
        check_launch(LaunchConfig(name="slurm", sbatch={"comment": value}))
    assert "\n" not in str(refused.value)


def test_values_as_slurm_documents_them_are_accepted() -> None:
    check_launch(
        LaunchConfig(
            name="slurm",
            partition="gpu,gpu-long",
            account="lab_1",
            qos="high.prio",
            sbatch={
                "constraint": "[rack1*2&(h100|h200)]",
                "gres": "gpu:a100:2",
                "begin": "2030-01-01T12:00:00",
                "mail_user": "me+jobs@example.org",
                "dependency": "afterok:123:456",
                "exclusive": True,
                "nice": -10,
                "comment": "second try, 50%",
            },
        )
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("cwd", "relative"),
        ("cwd", "/tmp\ntouch pwned"),
        ("targets", ["os.system;touch pwned"]),
        ("targets", ["a\x1b[2J"]),
    ],
)
def test_paths_and_targets_of_a_record_are_checked_when_it_is_opened(
    sweep: Sweep, key: str, value: object
) -> None:
    content = json.loads((sweep.path / SWEEP).read_text())
    (sweep.path / SWEEP).write_text(json.dumps({**content, key: value}))
    with pytest.raises(ConfigError, match=rf"sweep\.json: {key}: expected") as refused:
        Sweep.open(sweep.path)
    assert "\n" not in str(refused.value)


def test_a_sweep_under_a_path_that_breaks_a_script_is_refused(sweep: Sweep) -> None:
    moved = sweep.path.rename("sweep\ntouch pwned")
    with pytest.raises(ConfigError, match="expected a path without line breaks"):
        Sweep.open(moved)


@pytest.mark.parametrize("name", ["run.lock", "attempt.lock", "output.log", "metrics.jsonl"])
def test_a_link_in_a_run_directory_is_refused_and_what_it_leads_to_stays(
    sweep: Sweep, tmp_path: Path, name: str
) -> None:
    (tmp_path / "precious").write_text("mine")
    run_dir = sweep.run_dir(sweep.jobs[0])
    (run_dir / name).symlink_to(tmp_path / "precious")
    with pytest.raises(ConfigError, match=f"{name}: expected a regular file, this is a link"):
        if name == "run.lock":
            RunDir.open(run_dir).in_use().__enter__()
        elif name == "metrics.jsonl":
            JsonlLogger(run_dir / name)
        else:
            attempt(run_dir, ["true"])
    if name == "run.lock":
        with pytest.raises(ConfigError, match="this is a link"):
            held_by(run_dir)
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_jobs_directory_that_is_a_link_is_refused(sweep: Sweep, tmp_path: Path) -> None:
    run_dir = sweep.run_dir(sweep.jobs[1])
    run_dir.rename(tmp_path / "elsewhere")
    run_dir.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="expected a directory of its own, this is a link"):
        Sweep.open(sweep.path)


def test_a_hosts_name_is_quoted_where_it_is_to_be_typed(
    sweep: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    attempts = [{"host": "n1; touch pwned #", "pid": 1, "started": "yesterday"}]
    (sweep.run_dir(sweep.jobs[0]) / "attempts.json").write_text(json.dumps(attempts))
    assert status.main(["sweep"]) == 0
    told = capsys.readouterr().out
    assert "launch.retry sweep 'gone=n1; touch pwned #'" in told
