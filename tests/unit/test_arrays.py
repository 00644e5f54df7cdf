"""Arrays of the user's own: what a batch has of them, and what is refused before a run starts."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.makers import refusal_of
from trainer.data.arrays import arrays

ROWS = 40
LATENTS = np.random.default_rng(0).normal(size=(ROWS, 4, 2, 2)).astype(np.float16)
LABELS = np.arange(ROWS) % 7


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("a.npy", LATENTS[:25])
    np.save("b.npy", np.asfortranarray(LATENTS[25:]))
    np.save("labels.npy", LABELS.astype(">i2"))


def test_rows_of_several_files_come_with_their_labels() -> None:
    splits = arrays({"image": "[ab].npy", "label": "labels.npy"}, eval_fraction=0.3, scale={"image": 0.5})
    assert splits.facts == {"image_shape": [4, 2, 2], "num_classes": 7}
    seen = []
    for split in (splits.train, pickle.loads(pickle.dumps(splits.eval))):
        order = np.random.default_rng(1).permutation(len(split)).tolist()
        batch = split.__getitems__(order)
        assert batch["image"].dtype == torch.float32 and batch["label"].dtype == torch.int64
        rows = [
            int(np.flatnonzero((2 * image.numpy() == LATENTS).all((1, 2, 3)))[0]) for image in batch["image"]
        ]
        assert batch["label"].tolist() == LABELS[rows].tolist()
        seen += rows
    assert sorted(seen) == list(range(ROWS))
    assert 0 < len(splits.eval) < ROWS / 2


def test_a_path_with_brackets_is_that_file() -> None:
    np.save("run[1].npy", LATENTS)
    assert len(arrays({"image": "run[1].npy"}, eval_fraction=0.5).train) < ROWS


def test_the_split_of_the_first_rows_stays_when_rows_are_added() -> None:
    some = arrays({"x": "a.npy"}, eval_fraction=0.3)
    all_rows = arrays({"x": ["a.npy", "b.npy"]}, eval_fraction=0.3)
    few = len(some.eval)
    assert torch.equal(some.eval.__getitems__(range(few))["x"], all_rows.eval.__getitems__(range(few))["x"])


def test_files_of_their_own_are_the_evaluation_split() -> None:
    splits = arrays({"x": "a.npy"}, {"x": "b.npy"})
    assert (len(splits.train), len(splits.eval)) == (25, 15)
    assert splits.facts == {}


def test_files_of_both_splits_are_named_whatever_pattern_found_them() -> None:
    Path("link.npy").symlink_to("b.npy")
    own = {"x": ["./b.npy", "link.npy"], "y": saved(LABELS[:30])}
    splits = arrays({"x": "[ab].npy", "y": "labels.npy"}, own)
    assert splits.warnings == [
        "data.eval_fields.x: of 2 files, 2 are in data.fields.x too: ./b.npy, link.npy"
    ]


def test_a_file_that_several_patterns_match_is_read_once_so_that_no_row_is_in_both_splits() -> None:
    splits = arrays({"x": ["b.npy", "./[ab].npy", f"{Path.cwd()}/[ab].npy"]}, eval_fraction=0.3)
    assert len(splits.train) + len(splits.eval) == ROWS
    first = splits.train.part(np.arange(3)).__getitems__([0, 1, 2])["x"]
    assert torch.equal(first, torch.from_numpy(LATENTS[25:28]).float())
    Path("d.npy").symlink_to("a.npy")
    for paths in (["[abd].npy", "a.npy"], ["d.npy", "[abd].npy"], "[abd].npy"):
        splits = arrays({"x": paths}, eval_fraction=0.3)
        assert (len(splits.train) + len(splits.eval), splits.warnings) == (ROWS, [])


def test_a_path_that_is_written_twice_is_read_twice_and_warned_of() -> None:
    twice = arrays({"x": ["a.npy", "./a.npy"]}, eval_fraction=0.3)
    assert len(twice.train) + len(twice.eval) == 50
    assert twice.warnings == [
        "data.fields.x: there more than once, so rows of them may be in both splits: a.npy"
    ]
    labels = [saved(LABELS[:20]), "x.npy"]
    images = [saved(LATENTS[:20], "c.npy"), saved(LATENTS[20:], "d.npy")]
    assert not arrays({"image": images, "label": labels}).warnings
    assert not arrays({"x": ["c.npy", "c.npy"]}, {"x": "d.npy"}).warnings


def saved(array: Any, name: str = "x.npy") -> str:
    np.save(name, array, allow_pickle=True)
    return name


def cut(name: str) -> str:
    Path("cut.npy").write_bytes(Path(name).read_bytes()[:-10])
    return "cut.npy"


def zipped() -> str:
    np.savez("x.npz", LATENTS)
    return "x.npz"


def with_nan() -> np.ndarray:
    wrong = LATENTS.copy()
    wrong[ROWS - 1, 3, 1, 1] = np.nan
    return wrong


@pytest.mark.parametrize(
    ("fields", "settings", "expected"),
    [
        ({"x": lambda: "nowhere.npy"}, {}, "data.fields.x: nowhere.npy is not a file"),
        ({"x": lambda: "no*.npy"}, {}, "data.fields.x: no*.npy matches no file"),
        ({"x": zipped}, {}, "data.fields.x: x.npz is not a .npy file"),
        ({"x": lambda: saved(np.array([{}] * 9))}, {}, "data.fields.x: x.npy: "),
        ({"x": lambda: saved(np.array(["a"] * 9))}, {}, "data.fields.x: x.npy has <U1, expected floats or"),
        (
            {"x": lambda: saved(np.float32(1))},
            {},
            "data.fields.x: x.npy has shape (), expected at least one row",
        ),
        ({"x": lambda: cut("a.npy")}, {}, "data.fields.x: cut.npy: mmap length"),
        (
            {"x": lambda: ["a.npy", saved(LATENTS[:, :3])]},
            {},
            "data.fields.x: x.npy has rows of float16 of shape (3, 2, 2), expected rows of float16 of shape (4, 2,"
            " 2), as a.npy has",
        ),
        (
            {"x": lambda: ["a.npy", saved(LATENTS.astype(np.float32))]},
            {},
            "data.fields.x: x.npy has rows of float32 of shape (4, 2, 2), expected rows of float16",
        ),
        (
            {"image": lambda: "a.npy", "label": lambda: "labels.npy"},
            {},
            "data.fields.label: 40 rows, expected 25, as data.fields.image has",
        ),
        (
            {
                "image": lambda: ["a.npy", "b.npy"],
                "label": lambda: [saved(LABELS[:20], "p.npy"), saved(LABELS[20:], "q.npy")],
            },
            {},
            "data.fields.label: p.npy has 20 rows, expected 25, as a.npy has",
        ),
        (
            {"x": lambda: saved(with_nan())},
            {},
            "data.fields.x: x.npy has a value in row 39 that is not finite in float32",
        ),
        (
            {"x": lambda: saved(np.full((9, 1), 1e300))},
            {},
            "data.fields.x: x.npy has a value in row 0 that is not finite in float32",
        ),
        ({"label": lambda: saved(LABELS - 1)}, {}, "data.fields.label: row 0 is -1, expected 0 or more"),
        ({"label": lambda: "a.npy"}, {}, "data.fields.label: expected one integer in a row"),
        (
            {"image": lambda: saved(np.ones((9, 1, 2, 2), np.uint8))},
            {},
            "data.fields.image: integers, expected",
        ),
        (
            {"label": lambda: "labels.npy"},
            {"num_classes": 6},
            "data.num_classes: 6 is not above the largest label, 6",
        ),
        ({"x": lambda: "a.npy"}, {"scale": {"y": 1.0}}, "data.scale.y: not a field; data.fields has x"),
        (
            {"x": lambda: "a.npy"},
            {"eval_fields": {"y": "b.npy"}},
            "data.eval_fields: expected the fields of data.fields: x",
        ),
        ({}, {}, "data.fields: expected paths by field"),
        (
            {"x": lambda: saved(LATENTS[:1])},
            {},
            "data.fields: 1 rows are too few to split by data.eval_fraction=0.1",
        ),
    ],
)
def test_what_cannot_be_trained_on_is_refused_by_name(
    fields: dict[str, Any], settings: dict[str, Any], expected: str
) -> None:
    message = refusal_of(arrays, {name: make() for name, make in fields.items()}, **settings)
    assert message.startswith(expected)
    assert "\n" not in message
