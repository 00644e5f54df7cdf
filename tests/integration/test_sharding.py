"""The same run in any number of processes: one directory, one wandb run, the same numbers."""

import json
from pathlib import Path

import pytest

from launch import evaluate
from tests.integration.commands import Warm, last, records
from tests.makers import TINY_GPT

RUN = (*TINY_GPT, "ema=bank", "ema.decays=[0.9,0.99]", "trainer.steps=20", "trainer.log_every=5", "seed=3")
KEYS = ("eval/live/loss", "eval/ema/0.9/loss", "eval/ema/0.99/loss")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory, warm: Warm) -> Path:
    """The reference: 20 steps in one process."""
    folder = tmp_path_factory.mktemp("one")
    warm(*RUN, "run_dir=run", cwd=folder)
    return folder / "run"


@pytest.mark.parametrize(
    ("world", "sharding"),
    [
        (2, ["sharding=ddp"]),
        (2, ["sharding=fsdp"]),
        (4, ["sharding=fsdp"]),
        (4, ["sharding=hsdp", "sharding.replicate=2"]),
        (2, ["sharding=fsdp", "trainer.accumulate=2", "sharding.activation_checkpointing=true"]),
    ],
    ids=["ddp2", "fsdp2", "fsdp4", "hsdp2x2", "fsdp2-accumulate"],
)
def test_evaluation_losses_agree_with_one_process_to_1e_4(
    one_process: Path, tmp_path: Path, warm: Warm, world: int, sharding: list[str]
) -> None:
    printed = warm(*RUN, *sharding, "run_dir=run", cwd=tmp_path, ranks=world)
    assert "nothing is sharded" not in printed
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert last(tmp_path / "run", KEYS) == pytest.approx(last(one_process, KEYS), abs=1e-4)
    losses = [record["train/loss"] for record in records(one_process)]
    assert [record["train/loss"] for record in records(tmp_path / "run")] == pytest.approx(losses, abs=1e-4)
    # The averages differ from the live weights by far more than the tolerance, so an EMA that is not one is seen.
    live, short, long = last(one_process, KEYS)
    assert min(abs(live - short), abs(short - long)) > 1e-3


@pytest.mark.parametrize(
    ("world", "sharding", "note"),
    [
        (1, ["sharding=fsdp"], "nothing is sharded, because this run has one process; torchrun or, "),
        (2, ["sharding=hsdp"], "nothing is sharded, because each of the 2 processes is a replica "),
    ],
)
def test_a_run_says_that_its_sharding_shards_nothing(
    one_process: Path, tmp_path: Path, warm: Warm, world: int, sharding: list[str], note: str
) -> None:
    assert note in warm(*RUN, *sharding, "run_dir=run", cwd=tmp_path, ranks=world)
    assert last(tmp_path / "run", KEYS) == pytest.approx(last(one_process, KEYS), abs=1e-4)


def test_four_ranks_make_one_run_directory_and_one_wandb_run(tmp_path: Path, warm: Warm) -> None:
    quick = ("trainer.steps=4", "logger=wandb", "sharding=hsdp", "sharding.replicate=2")
    warm(*RUN, *quick, cwd=tmp_path, ranks=4)
    (run_dir,) = (tmp_path / "outputs").iterdir()
    offline = [path for path in (run_dir / "wandb").iterdir() if path.name.startswith("offline-run-")]
    assert len(offline) == 1
    assert len(list(offline[0].glob("*.wandb"))) == 1
    assert [record["train/step"] for record in records(run_dir)] == [4]


def test_batchnorm_statistics_are_shared_by_the_ranks_and_re_estimated_for_the_average(
    tmp_path: Path, warm: Warm
) -> None:
    warm(
        "experiment=digits_noise",
        "model=resnet",
        "model.widths=[4,8]",
        "model.blocks_per_stage=1",
        "sharding=fsdp",
        "ema.decays=[0.5]",
        "ema.batchnorm_batches=2",
        "trainer.steps=6",
        "trainer.global_batch_size=32",
        "trainer.eval_samples=32",
        "trainer.num_threads=1",
        "logger=none",
        "run_dir=run",
        cwd=tmp_path,
        ranks=2,
    )
    live, average = last(tmp_path / "run", ["eval/live/loss", "eval/ema/0.5/loss"])
    assert 0 < average < 10
    assert live != average
    # The statistics depend on how ranks split a batch. One process evaluates with those of the two.
    assert evaluate.main([str(tmp_path / "run"), f"out={tmp_path / 'again.json'}"]) == 0
    again = json.loads((tmp_path / "again.json").read_text())["metrics"]
    assert [again["eval/live/loss"], again["eval/ema/0.5/loss"]] == pytest.approx([live, average], rel=1e-6)
