"""The command of `trainer.on_checkpoint`: it runs beside the training, and only if this command line trusts it."""

import os
import sys
from pathlib import Path

import pytest

from tests.integration.commands import Warm, importable_here, interrupt_at, trainer
from tests.makers import TINY_GPT

SIZE = (
    "trainer.steps=4",
    "trainer.log_every=1",
    "trainer.eval_every=4",
    "trainer.save_every=1",
    "trainer.keep_checkpoints=1",
)
COPY = """
import os, shutil, sys
path, step, run_dir = sys.argv[1:]
assert "RANK" not in os.environ and "WORLD_SIZE" not in os.environ, "a rank of the run"
assert sys.stdin.read() == ""
shutil.copytree(path, f"copies of {os.path.basename(run_dir)}/{step}")
print("copied", step)
"""
GATE = """
import os, pathlib, sys
path, step, run_dir = sys.argv[1:]
if step == "1":
    open(f"{run_dir}/gate").read()  # a pipe: ends when the test, or the next command, writes to it
print("kept" if os.path.exists(f"{path}/COMMIT.json") else "gone", step)
"""
"""A command that runs for the whole training, because a pipe that it reads has no writer."""


def command(folder: Path, script: str, fields: str = "{path} {step} {run_dir}") -> str:
    (folder / "my script.py").write_text(script)
    return f"trainer.on_checkpoint={sys.executable} 'my script.py' {fields}"


def test_each_checkpoint_is_copied_by_a_command_of_the_command_line(tmp_path: Path, warm: Warm) -> None:
    chosen = (*TINY_GPT, *SIZE, "trainer.steps=2", command(tmp_path, COPY), "run_dir=run")
    said = warm(*chosen, "sharding=ddp", cwd=tmp_path, ranks=2)
    assert "warning: trainer.on_checkpoint" not in said
    copies = sorted((tmp_path / "copies of run").iterdir())
    assert [copy.name for copy in copies][-1] == "2" and all(
        (copy / "COMMIT.json").exists() for copy in copies
    )
    log = (tmp_path / "run" / "on_checkpoint.log").read_text()
    assert f"'my script.py' {tmp_path}/run/checkpoints/step-00000002 2 {tmp_path}/run\ncopied 2\n" in log
    assert log.startswith(f"step {copies[0].name}: ")


def test_a_command_that_fails_or_is_missing_is_a_warning(tmp_path: Path, warm: Warm) -> None:
    chosen = (*TINY_GPT, *SIZE, "trainer.save_every=0")
    failing = command(tmp_path, "print('no room'); raise SystemExit(3)", "")
    said = warm(*chosen, failing, "run_dir=a", cwd=tmp_path)
    log = tmp_path / "a" / "on_checkpoint.log"
    assert said.count("warning: trainer.on_checkpoint") == 1
    expected = "warning: trainer.on_checkpoint: exit code 3 at step 4; its output is in "
    assert f"{expected}{log}" in " ".join(said.split())
    assert log.read_text().endswith("no room\n")

    said = warm(*chosen, "trainer.on_checkpoint=no_such_program {path}", "run_dir=b", cwd=tmp_path)
    assert said.count("warning: trainer.on_checkpoint") == 1
    assert "'no_such_program' cannot be started at step 4: No such file or directory" in " ".join(
        said.split()
    )


def test_a_long_command_keeps_its_checkpoint_and_the_newest_one_waits(tmp_path: Path, warm: Warm) -> None:
    # The first command ends when the callback at the end of the run opens the pipe.
    (tmp_path / "my_end.py").write_text(
        "import os\n\n"
        "class End:\n"
        "    def at_end(self, run):\n"
        "        names = sorted(os.listdir(run.run_dir / 'checkpoints'))\n"
        "        (run.run_dir / 'names').write_text(' '.join(names))\n"
        "        open(run.run_dir / 'gate', 'w').close()\n\n"
        "    def after_step(self, run):\n"
        "        if run.step == 1:\n"
        "            os.mkfifo(run.run_dir / 'gate')\n"
    )
    said = warm(
        *TINY_GPT,
        *SIZE,
        "trainer.async_save=false",
        command(tmp_path, GATE),
        "+callbacks.end._target_=my_end.End",
        "run_dir=run",
        cwd=tmp_path,
        within=importable_here,
    )
    names = (tmp_path / "run" / "names").read_text().split()
    assert names[0] == "step-00000001"
    assert os.listdir(tmp_path / "run" / "checkpoints") == [
        "step-00000004"
    ]  # what was held is deleted at the end
    said = " ".join(said.split())
    for skipped in (2, 3):
        assert f"skips step {skipped}, because the command of step 1 still runs" in said
    log = (tmp_path / "run" / "on_checkpoint.log").read_text().splitlines()
    assert log[1::2] == ["kept 1", "kept 4"] and log[2].startswith("step 4: ")


def test_a_command_that_outlives_the_run_is_left_running(tmp_path: Path, warm: Warm) -> None:
    os.mkfifo(tmp_path / "gate")
    waits = command(tmp_path, "open('gate').read(); open('ended', 'w')", "")
    chosen = (*TINY_GPT, *SIZE, "trainer.save_every=0", "trainer.timeout_s=2")
    said = " ".join(warm(*chosen, waits, "run_dir=run", cwd=tmp_path).split())
    assert "trainer.on_checkpoint: the command of step 4 is left running as process " in said
    assert not (tmp_path / "ended").exists()
    with (tmp_path / "gate").open("w"):  # returns only because the command is there and reads
        pass


def test_a_stop_reaches_no_command_and_waits_for_it_shortly(tmp_path: Path) -> None:
    noting = (
        "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: print('signalled', flush=True))\n"
        "print('done', sys.argv[2])"
    )
    code, said = interrupt_at(
        2, *TINY_GPT, "trainer.steps=5000", command(tmp_path, noting), f"run_dir={tmp_path}/run", cwd=tmp_path,
        whole_group=True,
    )  # fmt: skip
    assert code == 75, said
    log = (tmp_path / "run" / "on_checkpoint.log").read_text()
    assert "signalled" not in log and "done" in log and "trainer.on_checkpoint:" not in said


def test_ranks_that_stopped_wait_for_the_command_of_rank_0(tmp_path: Path) -> None:
    # torchrun sends SIGTERM to all ranks as soon as one has ended with another exit code than 0. More than a second
    # after the first signal, as after the save of a large model, it would end rank 0.
    (tmp_path / "my_stop.py").write_text(
        "import os, signal, time\n\n"
        "class Stop:\n"
        "    def after_step(self, run):\n"
        "        if run.step == 2:\n"
        "            os.kill(os.getpid(), signal.SIGUSR2)\n\n"
        "    def at_end(self, run):\n"
        "        time.sleep(1.2)\n"
    )
    slow = command(tmp_path, "import time; time.sleep(3); print('copied')", "")
    chosen = (*TINY_GPT, "trainer.steps=5000", slow, "+callbacks.stop._target_=my_stop.Stop")
    done = trainer(
        *chosen, "sharding=ddp", "run_dir=run", "allow_targets=[my_stop.]", cwd=tmp_path, ranks=2, check=False
    )
    assert "copied" in (tmp_path / "run" / "on_checkpoint.log").read_text()
    assert "saved; continue with:" in done.stdout, done.stderr
    assert "left running" not in done.stdout + done.stderr


def test_a_command_of_a_file_needs_trust(tmp_path: Path, warm: Warm) -> None:
    chosen = (*TINY_GPT, *SIZE, "trainer.save_every=0", "run_dir=run")
    touches = "trainer.on_checkpoint=touch {run_dir}/touched_{step}"
    said = warm(*chosen, touches, cwd=tmp_path)
    (touched,) = (tmp_path / "run").glob("touched*")
    touched.unlink()
    entry = "allow_targets=['on_checkpoint=touch {run_dir}/touched_{step}']"
    assert entry in " ".join(said.split()).replace("\\", "")  # the printed command that continues the run

    more = ("resume=run", "trainer.steps=5")
    refused = warm(*more, cwd=tmp_path, code=2)
    assert refused.startswith("error: trainer.on_checkpoint: not allowed by this command line; ")
    assert f'"{entry}"' in refused
    assert "error: trainer.on_checkpoint: not allowed" in warm(
        *more, "allow_targets=['on_checkpoint=touch', touch.]", cwd=tmp_path, code=2
    )
    assert not list((tmp_path / "run").glob("touched*"))
    warm(*more, entry, cwd=tmp_path)
    assert (tmp_path / "run" / "touched_5").exists()
    warm("resume=run", "trainer.steps=6", "trainer.on_checkpoint=null", cwd=tmp_path)
    assert not (tmp_path / "run" / "touched_6").exists()


@pytest.mark.parametrize(
    "text", ["cp {where}", "cp {path!r}", "cp {step:03}", "cp {}", "cp {path", "'", "'cp"]
)
def test_a_command_that_cannot_be_filled_in_is_refused(text: str, tmp_path: Path, warm: Warm) -> None:
    said = warm(*TINY_GPT, f"trainer.on_checkpoint={text}", "run_dir=run", cwd=tmp_path, code=2)
    assert said.startswith(
        "error: trainer.on_checkpoint: expected a command line whose only fields are {path},"
    )
    assert not (tmp_path / "run").exists()
