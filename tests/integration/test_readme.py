"""README keeps its promises: every command line and every piece of Python in it runs.

What costs minutes is made small by overrides that are added to the line as printed; `make test` is what runs this.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forked import FURTHER_IMPORTS
from tests.integration.commands import REPOSITORY, TIMEOUT_S, environment, run_to_end

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)([^\n]*)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
COMMANDS = [line for language, _, body in BLOCKS if language == "sh" for line in body.splitlines()]
FILES = {name.strip(): body for language, name, body in BLOCKS if language == "python" and name.strip()}
SNIPPETS = [body for language, name, body in BLOCKS if language == "python" and not name.strip()]

SHORT = (
    "trainer.global_batch_size=8",
    "trainer.eval_samples=8",
    "trainer.eval_batch_size=4",
    "trainer.log_every=1",
    "trainer.num_threads=1",
)
LOGGED = "polyak train experiment=digits_flow"
"""One line stands for all in logging to wandb as they do by themselves."""
FROM_A_SHELL = "polyak sweep -m experiment=quickstart seed=1,2"
"""Beginning of the lines whose processes each start an interpreter, as those of `make train` do."""
NOT_OURS = "raise SystemExit('a file of the user was run')"
BY_HAND = {"make test", ". .venv/bin/activate"}
"""Lines that are what runs these tests, and in what."""


def run(line: str, folder: Path, *extra: str) -> subprocess.CompletedProcess[str]:
    """Run one line of README in `folder`, with this Python's programs first on the path."""
    variables = {"PATH": f"{Path(sys.executable).parent}:{environment()['PATH']}"}
    words = shlex.split(line)
    if words[0] == "python":  # a script of the user, to which Python gives the packages beside it first
        words[0] = sys.executable
        variables |= {"PYTHONSAFEPATH": "1", FURTHER_IMPORTS: "torch"}
    if any(part in line for part in ("load_", "gpt2/", "transformers", "outputs/lora")):
        variables[FURTHER_IMPORTS] = "transformers.models.gpt2.modeling_gpt2 peft"  # five seconds in each
    if line.startswith(FROM_A_SHELL):
        words = ["sh", "-c", 'exec "$@"', "sh", *words]
    return run_to_end([*words, *extra], cwd=folder, check=False, extra=variables)


def shortened(line: str) -> list[str]:
    """Overrides that make a printed command end in seconds."""
    if "polyak plan" in line:
        return ["model.n_layer=1"]
    if "polyak evaluate" in line and "trainer.eval_samples=" in line:
        return ["trainer.eval_samples=64"]
    if "polyak train" not in line and "polyak sweep" not in line:
        return []
    if "launch=print" in line:
        return []
    steps = 4 if "trainer.steps=4000" in line else 6 if "fork=" in line else 120 if "posthoc" in line else 3
    short = [*SHORT, f"trainer.steps={steps}"]
    if "logger=" not in line and "resume=" not in line and line != LOGGED:
        short.append("logger=none")  # wandb takes two seconds in each
    if "posthoc" in line:
        short.append("ema.snapshots=4")
    if "digits_guided" in line:
        short.append("task.distance_steps=2")
    if "digits_flow" in line or "digits_guided" in line:
        short += ["task.sample_steps=2", "task.sample_count=4", "model.hidden=32", "model.depth=1"]
    elif not any(
        part in line
        for part in (
            "digits",
            "mean_teacher",
            "byol",
            "model=custom",
            "model=lora",
            "model=mlp",
            "resume=",
            "fork=",
        )
    ):
        short += ["model.n_layer=1", "model.n_head=2", "model.n_embd=32"]
    return short


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all lines, with README's own files: later lines use what earlier ones made.

    It also has packages and a module with the names of ours, as folders of users have.
    """
    made = tmp_path_factory.mktemp("readme")
    for name in ("conf", "models"):
        (made / name).mkdir()
        (made / name / "__init__.py").write_text(NOT_OURS)
    (made / "trainer.py").write_text(NOT_OURS)
    for name, body in FILES.items():
        (made / name).write_text(body)
    return made


def test_readme_shows_what_it_must() -> None:
    for words in (
        FROM_A_SHELL,
        "make train",
        "make test",
        "resume=",
        "sharding=fsdp",
        "--nnodes=2",
        "polyak sweep -m",
        "polyak status",
        "polyak retry",
        "polyak plan",
        "polyak compare",
        "polyak evaluate",
        "polyak export",
        "polyak merge",
        "launch=slurm",
        "ema.rule=",
        "task._target_=",
        "+metrics.",
        "polyak sweep -m experiment=digits_guided seed=0,1,2",
    ):
        assert any(words in command for command in COMMANDS), words
    assert LOGGED in COMMANDS
    assert {"my_model.py", "my_task.py", "my_metrics.py", "my_rules.py"} <= FILES.keys()


@pytest.mark.parametrize("number", range(len(COMMANDS)), ids=lambda n: f"{n}-{COMMANDS[n][:60]}")
def test_command_runs_as_printed(folder: Path, number: int) -> None:
    line = COMMANDS[number]
    if line in BY_HAND:
        pytest.skip("this test runs in it")
    if line == "make train":
        if Path(sys.executable).parent != REPOSITORY / ".venv" / "bin":
            pytest.skip("would set up .venv; under `make test` it is there")
        arguments = " ".join([*SHORT, "trainer.steps=3", f"run_dir={folder / 'quickstart'}"])
        done = run(line, REPOSITORY, f"ARGS={arguments}")
        assert "report/index.html" in done.stdout
    elif "--nnodes=2" in line:
        done = two_agents(line, folder)
    else:
        # A cluster of GPUs is not here (tests/integration/test_slurm.py has one without), nor the time for 4,096 ranks.
        line = line.replace("launch=slurm", "launch=print").replace("world=8,64,512,4096", "world=8")
        line = line.replace("seed=0,1,2", "seed=0,1")  # each seed is a run of ten seconds
        done = run(line, folder, *shortened(line))
    assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def two_agents(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The line of a job on two nodes, started twice here: two agents that meet at the endpoint."""
    words = [*shlex.split(line), *shortened(line), "run_dir=two-nodes"]
    path = f"{Path(sys.executable).parent}:{environment()['PATH']}"
    env = environment({"PATH": path})
    agents = [
        subprocess.Popen(
            words, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(2)
    ]
    try:
        printed = [agent.communicate(timeout=TIMEOUT_S)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    code = max(agent.returncode for agent in agents)
    assert (folder / "two-nodes" / "report" / "index.html").exists(), printed
    return subprocess.CompletedProcess(words, code, "\n".join(printed), "")


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_python_runs_as_printed(tmp_path: Path, number: int) -> None:
    run_to_end([sys.executable, "-c", SNIPPETS[number]], cwd=tmp_path, extra={FURTHER_IMPORTS: "torch"})
