"""A user's own optimizer, schedule, logger, data and task, named on the command line, with nothing of ours edited."""

from pathlib import Path

import pytest

from tests.integration.commands import Warm, records, trainer
from tests.makers import TINY_GPT

OPTIMIZER = """
from torch.optim import SGD

class Lion(SGD):
    def __init__(self, params, lr, beta=0.5):
        assert beta == 0.25
        super().__init__(params, lr=lr, momentum=beta)
"""
SCHEDULE = """
def cyclic(step, steps, period):
    return (step % period) / period
"""
LOGGER = """
class Csv:
    def __init__(self, run_dir, name):
        self.path = run_dir / name

    def log(self, step, metrics):
        with self.path.open("a") as file:
            file.write(f"{step},{metrics['train/lr']}\\n")

    def image(self, step, name, path): ...
    def table(self, step, name, headers, rows): ...
    def close(self, summary, exit_code): ...
"""
DATA = """
from trainer.data.python_docs import python_docs

def first_bytes(count):
    return python_docs(context=32, eval_fraction=0.1, max_bytes=count)
"""
TASK = """
from trainer.tasks.language_modeling import LanguageModeling

class Weighted(LanguageModeling):
    def __init__(self, weight):
        self.weight = weight

    def losses(self, model, batch, random):
        return self.weight * super().losses(model, batch, random)
"""


def test_own_data_and_task_take_only_their_own_arguments(tmp_path: Path, warm: Warm) -> None:
    (tmp_path / "my_data.py").write_text(DATA)
    (tmp_path / "my_task.py").write_text(TASK)
    size = [one for one in TINY_GPT if not one.startswith("data.")]
    size += ["trainer.steps=1", "trainer.log_every=1", "trainer.eval_every=1"]
    own = ["data=custom", "data._target_=my_data.first_bytes", "+data.count=200000"]
    own += ["task=custom", "task._target_=my_task.Weighted", "+task.weight=0.0"]
    trainer(*size, *own, "run_dir=run", cwd=tmp_path)
    assert records(tmp_path / "run")[0]["train/loss"] == 0.0
    for group in ("data", "task"):
        line = warm(f"{group}=custom", cwd=tmp_path, code=2)
        assert f"{group}._target_: needs a value: {group}._target_=VALUE" in line


def test_own_optimizer_schedule_and_logger_train_and_resume(tmp_path: Path, warm: Warm) -> None:
    for name, text in (("my_opt", OPTIMIZER), ("my_sched", SCHEDULE), ("my_log", LOGGER)):
        (tmp_path / f"{name}.py").write_text(text)
    chosen = (
        "optimizer=custom",
        "optimizer._target_=my_opt.Lion",
        "+optimizer.args.beta=0.25",
        "~optimizer.args.foreach",
        "optimizer.lr=0.1",
    )
    chosen += ("schedule._target_=my_sched.cyclic", "+schedule.args.period=4")
    chosen += ("logger._target_=my_log.Csv", "+logger.args.name=lr.csv")
    size = ("trainer.steps=2", "trainer.log_every=1", "trainer.eval_every=2")
    trainer(*TINY_GPT, *chosen, *size, "run_dir=run", cwd=tmp_path)

    untrusted = warm("resume=run", "trainer.steps=3", cwd=tmp_path, code=2)
    allow = "allow_targets=[my_opt.Lion,my_sched.cyclic,my_log.Csv]"
    assert untrusted.startswith("error: optimizer._target_, schedule._target_, logger._target_: ")
    assert untrusted.endswith(f"add '{allow}'\n")

    trainer("resume=run", "trainer.steps=3", allow, cwd=tmp_path)
    rates = [record["train/lr"] for record in records(tmp_path / "run") if "train/lr" in record]
    assert rates == pytest.approx([0.025, 0.05, 0.075])
    logged = [line.split(",") for line in (tmp_path / "run" / "lr.csv").read_text().splitlines()]
    assert [(int(step), float(rate)) for step, rate in logged] == list(enumerate(rates, start=1))
