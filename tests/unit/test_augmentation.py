"""Which pictures a run with transforms trains on: the same for any ranks, workers and interruption, and random ones."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tests.makers import batches_of, refusal_of
from trainer.config.targets import instantiate
from trainer.data.batches import eval_batches
from trainer.data.image_folder import image_folder
from trainer.protocols import Dataset

SIZE, COUNT, BATCH, STEPS = 8, 12, 8, 4


class Noise(nn.Module):
    """Adds noise from every source that a transform may use."""

    def forward(self, picture: Tensor, generator: torch.Generator) -> Tensor:
        drawn = torch.randint(9, picture.shape) + torch.randint(9, picture.shape, generator=generator)
        drawn = drawn + random.randrange(9) + int(np.random.randint(9))
        return (picture + drawn).clamp(0, 255).to(torch.uint8)


class Crop:
    """Crops a square at random, of a size of its own."""

    def __init__(self, smallest: int = 4) -> None:
        self.smallest = smallest

    def __call__(self, picture: Tensor) -> Tensor:
        side = int(torch.randint(self.smallest, 10, ()))
        return picture[:, -side:, -side:]


class Fails:
    def __init__(self, result: Any = None) -> None:
        self.result = result

    def __call__(self, picture: Tensor) -> Any:
        if self.result is None:
            raise ValueError("no such\nluck")
        return self.result


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for label in "ab":
        (tmp_path / label).mkdir()
        for number in range(COUNT):
            pixels = np.random.default_rng(number).integers(0, 200, (10, 12, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / label / f"{number}.png")
    return tmp_path


def seen(split: Dataset, start: int = 0, world: int = 1, accumulate: int = 1, workers: int = 0) -> Tensor:
    """All pictures of the steps after `start`, in the order of the global batches."""
    each = [
        list(batches_of(split, BATCH, accumulate, rank, world, 7, start, STEPS, num_workers=workers))
        for rank in range(world)
    ]
    steps = [
        torch.cat([batch["image"] for batches in each for batch in batches[at : at + accumulate]])
        for at in range(0, (STEPS - start) * accumulate, accumulate)
    ]
    return torch.stack(steps)


@pytest.mark.parametrize(
    "ways", [{"world": 2}, {"accumulate": 2}, {"workers": 2}, {"world": 2, "workers": 1}]
)
def test_ranks_and_workers_do_not_change_a_picture(folder: Path, ways: dict[str, int]) -> None:
    split = image_folder(str(folder), SIZE, transforms=[Crop(), Noise()]).train
    assert torch.equal(seen(split, **ways), seen(split))


def test_a_run_that_goes_on_sees_the_pictures_of_one_that_was_not_stopped(folder: Path) -> None:
    split = image_folder(str(folder), SIZE, transforms=[Crop(), Noise()]).train
    torch.manual_seed(99)
    assert torch.equal(seen(split, start=2), seen(split)[2:])


def test_every_epoch_and_every_file_is_changed_in_another_way(folder: Path) -> None:
    split = image_folder(str(folder), SIZE, eval_path=str(folder), transforms=[Noise()]).train
    plain = image_folder(str(folder), SIZE, eval_path=str(folder)).train
    added = (seen(split) - seen(plain)).flatten(0, 1)
    assert len({tuple(noise.flatten().tolist()) for noise in added}) == BATCH * STEPS > len(split)


def test_evaluation_pictures_are_not_changed(folder: Path) -> None:
    changed, plain = (image_folder(str(folder), SIZE, transforms=chosen) for chosen in ([Noise()], []))
    for one, other in zip(
        eval_batches(changed.eval, 0, 4, 0, 1, 0), eval_batches(plain.eval, 0, 4, 0, 1, 0), strict=True
    ):
        assert torch.equal(one[0]["image"], other[0]["image"])


def test_statistics_come_from_changed_training_pictures_the_same_each_time(folder: Path) -> None:
    split = image_folder(str(folder), SIZE, transforms=[Noise()]).train
    first, again = (next(iter(eval_batches(split, 0, 4, 0, 1, 0))) for _ in range(2))
    assert torch.equal(first[0]["image"], again[0]["image"])
    plain = image_folder(str(folder), SIZE).train
    assert not torch.equal(first[0]["image"], next(iter(eval_batches(plain, 0, 4, 0, 1, 0)))[0]["image"])


def test_the_random_numbers_of_the_run_go_on_as_without_transforms(folder: Path) -> None:
    split = image_folder(str(folder), SIZE, transforms=[Noise()]).train

    def next_numbers() -> tuple[Any, ...]:
        return torch.rand(3).tolist(), random.random(), np.random.rand()

    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    expected = next_numbers()
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])
    seen(split)
    assert next_numbers() == expected


@pytest.mark.parametrize(
    ("transforms", "expected"),
    [
        ([Noise(), Fails()], "data.transforms[1] (Fails) fails on {}: no such luck"),
        ([Fails(3)], "data.transforms[0] (Fails) on {}: expected uint8 [3, height, width], got int"),
        ([Fails(torch.rand(3, 8, 8))], "data.transforms[0] (Fails) on {}: expected uint8"),
        ([Noise(), "Flip"], "data.transforms[1]: expected a _target_ that builds a callable, got 'Flip'"),
    ],
)
def test_a_transform_that_fails_is_named_with_the_file(
    folder: Path, transforms: Sequence[Any], expected: str
) -> None:
    message = refusal_of(image_folder, str(folder), SIZE, transforms=transforms)
    assert message.startswith(expected.format(f"{folder}/a/0.png"))


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"_target_": f"{__name__}.Crp"}, f"data.transforms[0]._target_: '{__name__}' has no 'Crp'"),
        ({"_target_": f"{__name__}.Crop", "size": 3}, "data.transforms[0].size: Crop takes no such argument"),
        ({"_target_": f"{__name__}.Crop", "smallest": "x"}, "data.transforms[0].smallest: expected int"),
        ({"_target_": f"{__name__}.Refuses"}, "data.transforms[0]: not today"),
        ({"_target_": "os.getcwd"}, "data.transforms[0]._target_: 'os.getcwd' is not under trainer.data."),
    ],
)
def test_a_transform_that_cannot_be_built_is_named(
    folder: Path, entry: dict[str, Any], expected: str
) -> None:
    node = {
        "_target_": "trainer.data.image_folder.image_folder",
        **{"path": str(folder), "image_size": SIZE, "transforms": [entry]},
    }
    message = refusal_of(instantiate, node, group="data", allowed=[f"{__name__}."])
    assert message.startswith(expected)


class Refuses:
    def __init__(self) -> None:
        raise ValueError("not today")

    def __call__(self, picture: Tensor) -> Tensor:
        return picture
