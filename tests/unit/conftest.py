"""Fixtures of several unit tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.sweeps.directory import Sweep
from tests.sweeps import make_sweep
from trainer.config.schema import TrainerConfig
from trainer.distributed.processes import join, leave


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone, as a run has one."""
    join(TrainerConfig(device="cpu"))
    yield
    leave()


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    """A sweep of three runs in a fresh current folder, none of them started."""
    monkeypatch.chdir(tmp_path)
    return make_sweep()
