"""The sweep of wandb in README, with wandb's own agent. wandb's server, which chooses the values, is not there."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.integration.commands import REPOSITORY, Warm, command, run_to_end
from tests.makers import TINY_GPT
from trainer.config.compose import compose, to_config

CHOSEN: dict[str, Any] = {
    "ema.decay": 0.99,
    "optimizer.lr": 0.00031622776601683794,
    "sharding.compile": False,
}
"""What the server could choose; a small learning rate is sent as 1e-05."""


def documented() -> dict[str, Any]:
    blocks = (REPOSITORY / "README.md").read_text().split("```yaml\n")[1:]
    (found,) = (block.partition("```")[0] for block in blocks if block.startswith("program: polyak"))
    content = yaml.safe_load(found)
    assert isinstance(content, dict)
    return content


def agent_command(values: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command that wandb's agent starts for these values, as its process would get it."""
    from wandb import wandb_agent

    started: list[list[str]] = []

    class Started:
        def __init__(self, *, command: list[str], env: Any, forward_signals: bool) -> None:
            started.append(command)

    monkeypatch.chdir(folder)
    monkeypatch.setenv("WANDB_RUN_ID", "abc")  # the agent sets it
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    monkeypatch.setattr(wandb_agent, "AgentProcess", Started)
    sweep = documented()
    agent = wandb_agent.Agent.__new__(wandb_agent.Agent)
    vars(agent).update(
        _in_jupyter=False,
        _function=None,
        _forward_signals=False,
        _sweep_command=list(sweep["command"]),
        _run_processes={},
    )
    arguments = {key: {"value": value} for key, value in values.items()}
    # A stand-in for the process has no time of a signal.
    Started.last_sigterm_time = None  # type: ignore[attr-defined]
    with monkeypatch.context() as environment:
        environment.setattr(os, "environ", os.environ.copy())  # the agent writes into it
        agent._command_run({"run_id": "abc", "program": sweep["program"], "args": arguments})
    (words,) = started
    return words


def test_the_agents_command_is_one_run_with_the_chosen_values(
    tmp_path: Path, warm: Warm, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert documented()["parameters"].keys() == CHOSEN.keys()
    words = agent_command(CHOSEN, tmp_path, monkeypatch)
    assert words[:2] == ["polyak", "train"]
    assert words[-3:] == ["ema.decay=0.99", "optimizer.lr=0.00031622776601683794", "sharding.compile=False"]
    done = run_to_end(command(*words[2:], "--cfg", "job"), cwd=tmp_path)
    shown = yaml.safe_load(done.stdout)
    assert (shown["ema"]["decay"], shown["optimizer"]["lr"]) == (0.99, CHOSEN["optimizer.lr"])
    assert shown["logger"]["mode"] == "online"
    warm(*words[2:], *TINY_GPT, "trainer.steps=1", "run_dir=run", cwd=tmp_path)
    frozen = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert frozen["optimizer"]["lr"] == CHOSEN["optimizer.lr"] and frozen["ema"]["decay"] == 0.99


def test_a_value_in_exponent_form_is_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = agent_command({"optimizer.lr": 1e-05}, tmp_path, monkeypatch)
    config = to_config(compose(words[2:])[0])
    assert words[-1] == "optimizer.lr=1e-05" and config.optimizer.lr == 1e-05
