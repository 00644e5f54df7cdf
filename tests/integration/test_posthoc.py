"""`ema=posthoc`: the snapshots that a run keeps, and `polyak posthoc`, which makes other averages from them."""

from pathlib import Path

import pytest

from ema.state import RULE
from tests.integration.commands import Warm
from tests.makers import TINY_GPT
from trainer.checkpoint.store import TensorReader, stored_tensors

RUN = (*TINY_GPT, "ema=posthoc", "ema.snapshots=4", "optimizer.lr=0.01", "trainer.steps=8")


def snapshots(run: Path) -> dict[str, dict[str, bytes]]:
    """Bytes of all tensors of each snapshot."""
    found = {}
    for path in sorted((run / "snapshots").glob("step-*")):
        if path.suffix:
            continue
        reader = TensorReader(path)
        # The rule has the length of the run, in which the runs of a test may differ.
        keys = [key for key in stored_tensors(path) if not key.endswith(RULE)]
        found[path.name] = {key: reader.read(key).numpy().tobytes() for key in keys}
    return found


@pytest.mark.parametrize(("world", "sharding"), [(1, ()), (2, ("sharding=fsdp",))], ids=["alone", "fsdp2"])
def test_a_series_has_the_averages_of_its_steps_and_goes_on_after_a_stop(
    tmp_path: Path, warm: Warm, world: int, sharding: tuple[str, ...]
) -> None:
    warm(*RUN, *sharding, "trainer.save_every=4", "run_dir=whole", cwd=tmp_path, ranks=world)
    series = snapshots(tmp_path / "whole")
    assert list(series) == [f"step-{step:08d}" for step in (0, 2, 4, 6, 8)]
    initial = series.pop("step-00000000")
    assert all(key.startswith("model/") for key in initial)
    for step in ("step-00000004", "step-00000008"):
        reader = TensorReader(tmp_path / "whole" / "checkpoints" / step)
        assert series[step] == {key: reader.read(key).numpy().tobytes() for key in series[step]}
    warm(*RUN, *sharding, "trainer.steps=4", "run_dir=halved", cwd=tmp_path, ranks=world)
    warm("resume=halved", "trainer.steps=8", cwd=tmp_path, ranks=world)
    resumed = snapshots(tmp_path / "halved")
    assert resumed.pop("step-00000000") == initial
    for step in ("step-00000002", "step-00000004", "step-00000006", "step-00000008"):
        assert resumed[step] == series[step], step
