"""A data worker of one rank that hangs, under torchrun: every rank ends, and one line names the rank and the data."""

from pathlib import Path

import pytest

from tests.integration.commands import trainer
from tests.makers import TINY_GPT

DATA = '''
import os
import time

from torch.utils.data import get_worker_info

from trainer.data.python_docs import python_docs
from trainer.protocols import Splits


class Faulty:
    """Rank 1 fails at its third batch."""

    def __init__(self, split, fault):
        self.split, self.fault, self.calls = split, fault, 0

    def __len__(self):
        return len(self.split)

    def __getitems__(self, indices):
        self.calls += 1
        if os.environ["RANK"] == "1" and self.calls == 3:
            if self.fault == "hang":
                time.sleep(1000)
            os._exit(9)
        return self.split.__getitems__(indices)


def faulty(fault, **arguments):
    splits = python_docs(**arguments)
    return Splits(Faulty(splits.train, fault), splits.eval, splits.facts)
'''
CAUSE = {
    "hang": ("data: no batch within 9 s (90% of trainer.timeout_s)",),
    # It may be noticed as a child that has ended, or while its batch is fetched.
    "die": ("data: DataLoader worker (pid ", "data: DataLoader worker ended before its batch was read: "),
}


@pytest.mark.parametrize("fault", CAUSE)
def test_a_worker_of_one_rank_ends_all_ranks_and_is_named(tmp_path: Path, fault: str) -> None:
    (tmp_path / "own_data.py").write_text(DATA)
    done = trainer(
        *TINY_GPT,
        *("data._target_=own_data.faulty", f"+data.fault={fault}", "sharding=ddp", "trainer.steps=9"),
        *("trainer.num_workers=1", "trainer.timeout_s=10", "run_dir=run"),
        cwd=tmp_path,
        ranks=2,
        check=False,
    )
    assert done.returncode == 1
    causes = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(causes) == 1, done.stderr
    assert causes[0].startswith(tuple(f"error: rank 1: {cause}" for cause in CAUSE[fault])), done.stderr
    assert "rank 0: lost the other ranks while training" in done.stderr
