"""Files of the library `datasets`: what a batch has of their columns, and what is refused before a run starts."""

import io
import json
import pickle
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.makers import batches_of, refusal_of
from trainer.data.hf import hf
from trainer.protocols import Augments

datasets = pytest.importorskip("datasets", reason="the extra is not installed")
pa = pytest.importorskip("pyarrow", reason="the extra is not installed")

ROWS = 40
FEATURES = {
    "img": datasets.Image(),
    "label": datasets.ClassLabel(names=["cat", "dog"]),
    "ids": datasets.List(datasets.Value("int32")),
    "grid": datasets.Array2D((2, 3), "float32"),
    "nested": datasets.List(datasets.List(datasets.Value("float16"), length=3)),
    "text": datasets.Value("string"),
}


def pixels(row: int) -> np.ndarray:
    return np.random.default_rng(row).integers(0, 255, (4, 4, 3), np.uint8)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same rows as a folder, a folder with splits, Parquet, a stream of Arrow and a file of Arrow."""
    folder = tmp_path_factory.mktemp("hf")
    grids = [np.full((2, 3), row) for row in range(ROWS)]
    rows = {
        "img": [Image.fromarray(pixels(row)) for row in range(ROWS)],
        "label": [row % 2 for row in range(ROWS)],
        "ids": [[row, row + 1, 2 * row, 7] for row in range(ROWS)],
        "grid": grids,
        "nested": [grid.tolist() for grid in grids],
        "text": ["a"] * ROWS,
    }
    data = datasets.Dataset.from_dict(rows, features=datasets.Features(FEATURES))
    data.save_to_disk(folder / "folder", num_shards=3)
    datasets.DatasetDict({"train": data, "test": data.select(range(8))}).save_to_disk(folder / "splits")
    data.select(range(25)).to_parquet(folder / "0.parquet")
    data.select(range(25, ROWS)).to_parquet(folder / "1.parquet")
    with pa.OSFile(str(folder / "file.arrow"), "wb") as sink, pa.ipc.new_file(sink, data.data.schema) as out:
        out.write_table(data.data.table, max_chunksize=10)
    return folder


@pytest.fixture(autouse=True)
def without_network(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: Any, **settings: Any) -> Any:
        raise AssertionError("the network is used")

    monkeypatch.chdir(made)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", made / "cache")


@pytest.mark.parametrize("path", ["folder", "splits", "[01].parquet", "file.arrow", "folder/*.arrow"])
def test_each_kind_of_file_gives_all_rows(path: str) -> None:
    columns = {"image": "img", "label": "label", "grid": "grid", "nested": "nested", "ids": "ids"}
    splits = hf(path, columns, image_size=4, eval_fraction=0.3)
    assert splits.facts == {"image_shape": [3, 4, 4], "num_classes": 2, "classes": ["cat", "dog"]}
    seen = []
    for split in (splits.train, pickle.loads(pickle.dumps(splits.eval))):
        batch = split.__getitems__(np.random.default_rng(1).permutation(len(split)).tolist())
        rows = batch["ids"][:, 0].tolist()
        assert batch["label"].tolist() == [row % 2 for row in rows]
        assert batch["ids"].tolist() == [[row, row + 1, 2 * row, 7] for row in rows]
        expected = np.stack([pixels(row) for row in rows]).transpose(0, 3, 1, 2) / np.float32(127.5) - 1
        assert np.array_equal(batch["image"].numpy(), expected.astype(np.float32))
        full = torch.tensor(rows, dtype=torch.float32)[:, None, None].expand(-1, 2, 3)
        assert torch.equal(batch["grid"], full) and torch.equal(batch["nested"], full)
        seen += rows
    assert sorted(seen) == list(range(ROWS))
    assert 0 < len(splits.eval) < ROWS / 2


def test_the_evaluation_split_is_a_split_or_files() -> None:
    for settings in ({"eval_split": "test"}, {"eval_path": "1.parquet"}):
        splits = hf("splits", {"tokens": "ids"}, **settings)  # type: ignore[arg-type]
        assert len(splits.train) == ROWS
        assert len(splits.eval) == (8 if "eval_split" in settings else 15)
        assert splits.facts == {"context": 3, "vocab_size": 2 * ROWS - 1}
        assert splits.reasons["vocab_size"].startswith(
            "data.columns.tokens: column 'ids' of splits/train has"
        )


def test_forked_workers_read_the_same_rows() -> None:
    splits = hf("splits", {"image": "img", "tokens": "ids"}, image_size=4)
    here, there = (
        list(batches_of(splits.train, 8, 1, 0, 1, 0, 0, 6, num_workers=workers)) for workers in (0, 2)
    )
    assert len(here) == 6
    assert all(torch.equal(a[name], b[name]) for a, b in zip(here, there, strict=True) for name in a)


def test_an_evaluation_on_the_training_rows_is_warned_of() -> None:
    splits = hf("splits", {"tokens": "ids"}, eval_split="train")
    expected = "of 1 files of the evaluation split splits/train, 1 are in the training split too"
    assert splits.warnings == [f"data.path: {expected}"]
    (warning,) = hf("[01].parquet", {"tokens": "ids"}, eval_path="./1.parquet").warnings
    assert warning.startswith("data.eval_path: of 1 files") and "1 are in the training" in warning
    assert not hf("splits", {"tokens": "ids"}, eval_split="test").warnings
    (warning,) = hf(["1.parquet", "1.parquet"], {"tokens": "ids"}).warnings
    assert warning.endswith("may be in both splits: 1.parquet")
    assert not hf(["[01].parquet", "1.parquet"], {"tokens": "ids"}).warnings


class Invert:
    def __call__(self, picture: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return 255 - picture if torch.rand((), generator=generator) < 0.5 else picture


def test_transforms_change_training_pictures_by_their_seed() -> None:
    splits = hf("splits", {"image": "img"}, eval_split="test", image_size=4, transforms=[Invert()])
    assert isinstance(splits.train, Augments) and not isinstance(splits.eval, Augments)
    plain = splits.train.__getitems__([3] * 20)["image"]
    changed = splits.train.augmented([3] * 20, range(20))["image"]
    inverted = [
        bool(torch.allclose(one, -other, atol=1e-6)) for one, other in zip(changed, plain, strict=True)
    ]
    assert 0 < sum(inverted) < 20
    assert torch.equal(splits.train.augmented([3], [7])["image"], changed[7:8])


def test_changed_parquet_is_read_anew(tmp_path: Path) -> None:
    path = str(tmp_path / "x.parquet")
    for count in (20, 30):
        datasets.Dataset.from_dict({"x": list(range(count))}).to_parquet(path)
        splits = hf(path, {"x": "x"}, eval_fraction=0.5)
        assert len(splits.train) + len(splits.eval) == count


def test_a_file_with_a_pattern_in_its_name_is_that_file(tmp_path: Path) -> None:
    for name, value in (("a[1]", 3), ("a1", 5)):
        datasets.Dataset.from_dict({"x": [value] * 30}).to_parquet(tmp_path / f"{name}.parquet")
    assert set(
        hf(str(tmp_path / "a[1].parquet"), {"label": "x"}).train.__getitems__([0, 1])["label"].tolist()
    ) == {3}


def saved(tmp_path: Path, values: Any, feature: Any = None) -> str:
    features = datasets.Features({"x": feature}) if feature is not None else None
    datasets.Dataset.from_dict({"x": values}, features=features).save_to_disk(tmp_path / "x")
    return str(tmp_path / "x")


def encoded(picture: bytes | None) -> list[dict[str, Any]]:
    good = io.BytesIO()
    Image.fromarray(pixels(0)).save(good, "PNG")
    return [{"bytes": good.getvalue(), "path": None}] * 3 + [{"bytes": picture, "path": "elsewhere.png"}]


STRUCTURE = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
INTEGERS = datasets.List(datasets.Value("int64"))


@pytest.mark.parametrize(
    ("values", "feature", "field", "expected"),
    [
        (
            [[1, 2], [3, 4], [5]],
            INTEGERS,
            "x",
            "has a list of 1 values in row 2, expected 2 as in row 0; rows must",
        ),
        ([[1, 2], None, [5, 6]], INTEGERS, "x", "has no value in row 1"),
        ([[1, 2], [3, 4], [None, 1]], INTEGERS, "x", "has no value in row 2"),
        (["a", "b"], None, "x", "has string, expected numbers"),
        ([1], datasets.Value("uint64"), "x", "has uint64, expected numbers"),
        ([[], []], INTEGERS, "x", "has no values"),
        ([0.0, 1.0, float("nan")], None, "x", "has a value in row 2 that is not finite"),
        ([0.5, 1.0], None, "label", "has floats of shape [], expected one integer in a row"),
        ([-1, 1, 2], None, "label", "has -1, expected 0 or more"),
        ([1, 2, 3], None, "tokens", "has integers of shape [], expected a list of integers in a row"),
        ([[1], [2], [3]], INTEGERS, "tokens", "has one token in a row, expected at least 2"),
        ([1, 2, 3], None, "image", "has integers, expected pictures or floats"),
        (encoded(None), STRUCTURE, "image", "has no value in row 3"),
    ],
)
def test_a_column_that_cannot_be_a_field_is_refused(
    values: Any, feature: Any, field: str, expected: str, tmp_path: Path
) -> None:
    path = saved(tmp_path, values, feature)
    refusal = refusal_of(lambda: hf(path, {field: "x"}, image_size=4, eval_path=path))
    assert refusal.startswith(f"data.columns.{field}: column 'x' of {path} {expected}")


def test_a_missing_picture_is_refused_whatever_its_bytes(tmp_path: Path) -> None:
    cells = pa.StructArray.from_arrays(
        [pa.array([b"", b""]), pa.array(["", ""])], ["bytes", "path"], mask=pa.array([False, True])
    )
    path = str(tmp_path / "x.arrow")
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, pa.schema({"x": cells.type})) as out:
        out.write_table(pa.table({"x": cells}))
    refusal = refusal_of(lambda: hf(path, {"image": "x"}, image_size=4, eval_path=path))
    assert refusal == f"data.columns.image: column 'x' of {path} has no value in row 1"


def test_a_damaged_picture_is_refused_by_its_row(tmp_path: Path) -> None:
    path = saved(tmp_path, encoded(b"no picture"), datasets.Image())
    splits = hf(path, {"image": "x"}, image_size=4, eval_path=path)
    splits.train.__getitems__([0, 1, 2])
    refusal = refusal_of(lambda: splits.train.__getitems__([3]))
    assert refusal.startswith(f"data.columns.image: column 'x' of {path}: row 3 cannot be read as an image")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"columns": {"x": "nowhere"}},
            "data.columns.x: folder has no column 'nowhere', expected img, label, ids",
        ),
        ({"columns": {}}, "data.columns: expected columns by field"),
        (
            {"columns": {"image": "img"}},
            "data.image_size: expected a number of pixels, because data.columns.image",
        ),
        (
            {"path": "splits", "split": "dev"},
            "data.split: dev is not a split of splits, expected train, test",
        ),
        ({"path": "splits", "eval_split": "dev"}, "data.eval_split: dev is not a split of splits, expected"),
        ({"eval_split": "test"}, "data.eval_split: folder has no splits"),
        ({"path": "folder/", "eval_split": "test"}, "data.eval_split: folder has no splits"),
        ({"eval_path": "1.parquet", "eval_split": "test"}, "data.eval_split: 1.parquet has no splits"),
        ({"eval_split": "train"}, "data.eval_split: folder has no splits"),
        ({"split": "dev"}, "data.split: folder has no splits"),
        ({"eval_path": "splits"}, "data.eval_split: None is not a split of splits, expected train, test"),
        ({"path": "."}, "data.path: . has no state.json of save_to_disk; name its files"),
        ({"path": "user/corpus"}, "data.path: user/corpus is not a file; a name on a hub is not loaded"),
        (
            {"path": "folder/state.json"},
            "data.path: folder/state.json cannot be read as an Arrow",
        ),
        ({"path": ["0.parquet", "file.arrow"]}, "data.path: file.arrow is of another format than 0.parquet"),
        (
            {"vocab_size": 9},
            "data.vocab_size: 9 is not above 78, which data.columns.tokens: column 'ids' of folder",
        ),
        ({"num_classes": 9}, "data.num_classes: expected a field label in data.columns"),
        ({"transforms": [print]}, "data.transforms: expected a column of pictures"),
        ({"columns": {"label": "label"}, "num_classes": 1}, "data.num_classes: 1 is not above 1, which"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], expected: str) -> None:
    settings = {"path": "folder", "columns": {"tokens": "ids"}, **settings}
    assert refusal_of(lambda: hf(**settings)).startswith(expected)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    refusal = refusal_of(lambda: hf("folder", {"tokens": "ids"}))
    assert refusal == "data=hf: needs the package datasets: pip install -c constraints.txt -e '.[datasets]'"


def _with_state(folder: Path, **state: Any) -> None:
    path = folder / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **state}))


def _outside(folder: Path) -> None:
    _with_state(folder, _data_files=[{"filename": "../../folder/data-00000-of-00003.arrow"}])


def _remote(folder: Path) -> None:
    _with_state(folder, _data_files=[{"filename": "https://example.org/x.arrow"}])


def _lists(folder: Path) -> None:
    (folder / "state.json").write_text("[]")


def _split_outside(folder: Path) -> None:
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["../folder"]}))


@pytest.mark.parametrize("change", [_outside, _remote, _lists, _split_outside])
def test_a_folder_cannot_name_files_elsewhere(change: Callable[[Path], None], tmp_path: Path) -> None:
    path = Path(saved(tmp_path, [1, 2, 3]))
    change(path)
    refusal = refusal_of(lambda: hf(str(path), {"x": "x"}))
    assert refusal.startswith(f"data.path: {path}/") and "\n" not in refusal


class _Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path("trapped").touch, ()


def test_neither_code_nor_pickles_of_a_folder_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(saved(tmp_path, [1, 2, 3, 4]))
    trap = "from pathlib import Path; Path('trapped').touch()"
    for name in ("x.py", "folder.py", "dataset.py"):
        (path / name).write_text(trap)
    info = {"builder_name": "x", "features": {"x": {"_type": "Path"}}, "_type": "eval"}
    (path / "dataset_info.json").write_text(json.dumps(info))
    _with_state(path, _format_type="custom", _format_kwargs={"transform": trap})
    splits = hf(str(path), {"x": "x"}, eval_path=str(path))
    assert splits.train.__getitems__([0, 3])["x"].tolist() == [1, 4]
    (file,) = path.glob("*.arrow")
    features = {"info": {"features": {"x": {"_type": "os.system", "command": "touch trapped"}}}}
    extension = {
        "ARROW:extension:name": "arrow.py_extension_type",
        "ARROW:extension:metadata": pickle.dumps(_Trap()),
    }
    for of_schema, of_field in (({"huggingface": json.dumps(features)}, {}), ({}, extension)):
        schema = pa.schema([pa.field("x", pa.int64(), metadata=of_field)], metadata=of_schema)
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as out:
            out.write_table(pa.table({"x": [5, 6]}, schema=schema))
        try:
            assert hf(str(path), {"x": "x"}, eval_path=str(path)).train.__getitems__([1])["x"].tolist() == [6]
        except BaseException as error:
            assert type(error).__name__ == "ConfigError" and "\n" not in str(error)
    assert not Path("trapped").exists()


def test_wrong_offsets_of_a_damaged_file_are_refused(tmp_path: Path) -> None:
    offsets = pa.py_buffer(np.array([0, 2**30, 4, 6], np.int32).tobytes())
    values = pa.array(np.arange(6))
    lists = pa.Array.from_buffers(pa.list_(pa.int64()), 3, [None, offsets], children=[values])
    path = str(tmp_path / "x.arrow")
    table = pa.table({"x": lists})
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_stream(sink, table.schema) as out:
        out.write_table(table)
    assert refusal_of(lambda: hf(path, {"x": "x"})).startswith(f"data.columns.x: column 'x' of {path}: ")
