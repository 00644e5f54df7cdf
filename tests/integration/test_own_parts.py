"""A user's own optimizer, schedule and logger, named on the command line, with nothing of ours edited."""

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


def test_own_optimizer_schedule_and_logger_train_and_resume(tmp_path: Path, warm: Warm) -> None:
    for name, text in (("my_opt", OPTIMIZER), ("my_sched", SCHEDULE), ("my_log", LOGGER)):
        (tmp_path / f"{name}.py").write_text(text)
    chosen = (
        "optimizer=custom",
        "optimizer._target_=my_opt.Lion",
        "+optimizer.args.beta=0.25",
        "optimizer.lr=0.1",
    )
    chosen += ("schedule._target_=my_sched.cyclic", "+schedule.args.period=4")
    chosen += ("logger._target_=my_log.Csv", "+logger.args.name=lr.csv")
    size = ("trainer.steps=2", "trainer.log_every=1", "trainer.eval_every=2")
    trainer(*TINY_GPT, *chosen, *size, "run_dir=run", cwd=tmp_path)

    untrusted = warm("resume=run", "trainer.steps=3", cwd=tmp_path, code=2)
    assert "_target_" in untrusted and "allow_targets=[my_" in untrusted

    trainer("resume=run", "trainer.steps=3", "allow_targets=[my_opt.,my_sched.,my_log.]", cwd=tmp_path)
    rates = [record["train/lr"] for record in records(tmp_path / "run") if "train/lr" in record]
    assert rates == pytest.approx([0.025, 0.05, 0.075])
    logged = [line.split(",") for line in (tmp_path / "run" / "lr.csv").read_text().splitlines()]
    assert [(int(step), float(rate)) for step, rate in logged] == list(enumerate(rates, start=1))
