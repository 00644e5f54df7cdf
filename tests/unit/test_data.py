"""Data sets: what a sample is, how the text or images are split, and what bad input is told.

Numbers: windows by their definition, shares from the arguments.
"""

import inspect
import json
import os
import pickle
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tests.makers import batches_of, refusal_of, whole
from trainer.data import arrays as arrays_module
from trainer.data import digits as digits_module
from trainer.data import image_folder as image_folder_module
from trainer.data import python_docs as python_docs_module
from trainer.data import text_files as text_files_module
from trainer.data import tokens as tokens_module
from trainer.data.digits import digits
from trainer.data.held_out import is_held_out
from trainer.data.image_folder import image_folder
from trainer.data.python_docs import python_docs
from trainer.data.text_files import text_files
from trainer.data.tokens import tokens
from trainer.data.windows import TokenWindows
from trainer.errors import ConfigError
from trainer.protocols import Dataset, Splits

CONF = Path(__file__).parents[2] / "conf"
MODULES: list[ModuleType] = [
    arrays_module,
    digits_module,
    image_folder_module,
    python_docs_module,
    text_files_module,
    tokens_module,
]


def text_of(dataset: Dataset) -> bytes:
    windows = whole(dataset)["tokens"]
    return bytes(windows[0, :1].tolist() + windows[:, 1:].flatten().tolist())


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_a_data_choice_lists_every_argument_with_its_default(module: ModuleType) -> None:
    name = module.__name__.rpartition(".")[2]
    signature = inspect.signature(getattr(module, name), eval_str=True)
    assert signature.return_annotation is Splits
    choice = yaml.safe_load((CONF / "data" / f"{name}.yaml").read_text())
    assert choice.pop("_target_") == f"trainer.data.{name}.{name}"
    assert list(choice) == list(signature.parameters)
    for key, parameter in signature.parameters.items():
        assert parameter.annotation is not inspect.Parameter.empty
        assert choice[key] == ("???" if parameter.default is inspect.Parameter.empty else parameter.default)


def test_each_token_but_the_first_is_a_target_exactly_once() -> None:
    windows = whole(TokenWindows(np.arange(31, dtype=np.uint16), 10, "data.x"))["tokens"]
    assert windows.dtype == torch.int64
    assert windows.shape == (3, 11)
    assert windows[:, 1:].flatten().tolist() == list(range(1, 31))
    assert windows[:, 0].tolist() == [0, 10, 20]


@pytest.mark.parametrize(("length", "windows"), [(11, 1), (20, 1), (21, 2)])
def test_windows_end_where_the_tokens_end(length: int, windows: int) -> None:
    assert len(TokenWindows(np.zeros(length, np.uint8), 10, "data.x")) == windows


def test_python_docs_are_bytes_of_real_documents_in_two_disjoint_splits() -> None:
    splits = python_docs(context=64, eval_fraction=0.2, max_bytes=400_000)
    assert dict(splits.facts) == {"vocab_size": 256, "context": 64}
    train, evaluation = text_of(splits.train), text_of(splits.eval)
    assert len(train) == pytest.approx(320_000, rel=0.01)
    assert len(evaluation) == pytest.approx(80_000, rel=0.01)
    assert not set(filter(long, train.split(b"\0")[:-1])) & set(filter(long, evaluation.split(b"\0")[:-1]))
    # The topics of help() are there, about half of so small a text, beside the sources.
    from pydoc_data.topics import topics

    whole_topics = [text for name, text in topics.items() if text.encode() in train]
    assert 0.25 < sum(map(len, whole_topics)) / len(train) <= 0.5
    assert train.count(b"import ") > 20


def long(document: bytes) -> bool:
    """Long enough that two of them are not the same by chance, as empty `__init__` files are."""
    return len(document) > 200


def test_python_docs_are_the_same_each_time() -> None:
    once, again = python_docs(max_bytes=50_000), python_docs(max_bytes=50_000)
    assert text_of(once.train) == text_of(again.train)
    assert text_of(once.eval) == text_of(again.eval)


def test_python_docs_without_the_sources_are_the_topics(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(python_docs_module.sysconfig, "get_path", lambda name: str(tmp_path / "none"))
    assert b"import" in text_of(python_docs().train)
    monkeypatch.setitem(__import__("sys").modules, "pydoc_data.topics", None)
    with pytest.raises(ConfigError, match="this Python"):
        python_docs()


def test_python_docs_skip_tests_and_what_differs_between_machines() -> None:
    paths = python_docs_module._sources()
    assert "json/decoder.py" in paths
    folders = {part for path in paths for part in path.split("/")[:-1]}
    assert not folders & {"test", "tests", "idlelib", "site-packages", "pydoc_data"}
    assert not [path for path in paths if path.startswith(("_sysconfigdata", "sitecustomize"))]


def test_a_document_stays_in_its_split_as_the_share_grows() -> None:
    names = [f"document {number}" for number in range(10_000)]
    few = {name for name in names if is_held_out(name, 0.1)}
    many = {name for name in names if is_held_out(name, 0.3)}
    assert few < many
    # Binomial, 10,000 trials: standard deviations 30 and 46.
    assert len(few) == pytest.approx(1000, abs=150)
    assert len(many) == pytest.approx(3000, abs=230)


def test_text_files_keep_the_end_of_each_file_for_evaluation(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_bytes(b"a" * 80 + b"A" * 20)
    (tmp_path / "deep" / "b.txt").write_bytes(b"b" * 40 + b"B" * 10)
    (tmp_path / "deep" / "c.md").write_bytes(b"c" * 100)
    patterns = [f"{tmp_path}/**/*.txt", f"{tmp_path}/a.txt"]
    splits = text_files(patterns, context=1, eval_fraction=0.2)
    assert text_of(splits.train) == b"a" * 80 + b"\0" + b"b" * 40 + b"\0"
    assert text_of(splits.eval) == b"A" * 20 + b"\0" + b"B" * 10 + b"\0"
    assert dict(splits.facts) == {"vocab_size": 256, "context": 1}


def bin_file(path: Path, values: np.ndarray, dtype: str = "uint16") -> str:
    values.astype(dtype).tofile(path)
    return str(path)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int32", "int64"])
def test_token_files_read_back_what_was_written(tmp_path: Path, dtype: str) -> None:
    values = np.random.default_rng(0).integers(0, 200, 101)
    path = bin_file(tmp_path / "train.bin", values, dtype)
    splits = tokens(path, path, context=10, dtype=dtype, vocab_size=200)
    windows = whole(splits.train)["tokens"]
    assert windows.dtype == torch.int64
    assert windows[:, 1:].flatten().tolist() == values[1:].tolist()
    assert dict(splits.facts) == {"vocab_size": 200, "context": 10}
    largest = int(values.max())
    assert dict(tokens(path, path, context=10, dtype=dtype).facts) == {
        "context": 10,
        "vocab_size": largest + 1,
    }


def test_token_files_are_mapped_and_workers_map_them_again(tmp_path: Path) -> None:
    path = bin_file(tmp_path / "train.bin", np.arange(50_001) % 50_000)
    dataset = tokens(path, path, context=100).train
    assert isinstance(dataset._tokens, np.memmap)  # type: ignore[attr-defined]
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 1000
    again = pickle.loads(pickled)
    assert torch.equal(whole(again)["tokens"], whole(dataset)["tokens"])


def test_data_knows_the_bytes_that_its_targets_stand_for(tmp_path: Path) -> None:
    """Of a byte, one; of a token, what the table says: targets 1 2 3 and 4 0 1 of lengths 1, 2, 3, 4 and 0."""
    (tmp_path / "train.bin").write_bytes(bytes([0, 1, 2, 3, 4, 0, 1]))
    np.save(tmp_path / "lengths.npy", np.array([0, 1, 2, 3, 4], np.uint8))
    path, lengths = str(tmp_path / "train.bin"), str(tmp_path / "lengths.npy")
    splits = tokens(path, path, context=3, dtype="uint8", token_bytes=lengths)
    assert whole(splits.train)["bytes"].tolist() == [6, 5]
    assert splits.facts["vocab_size"] == 5
    assert "bytes" not in whole(tokens(path, path, context=3, dtype="uint8").train)
    assert whole(python_docs(context=64, max_bytes=10_000).eval)["bytes"].unique().tolist() == [64]


def test_a_vocabulary_may_be_larger_than_the_table_that_tokenize_wrote(tmp_path: Path) -> None:
    """GPT-2's 50,257 tokens are often padded to 50,304."""
    facts = {"tokenizer_sha256": "0", "dtype": "uint8", "vocab_size": 5}
    means = {"train_bytes_per_token": 2.0, "eval_bytes_per_token": 2.0}
    (tmp_path / "meta.json").write_text(json.dumps(facts | means))
    np.save(tmp_path / "token_bytes.npy", np.array([0, 1, 2, 3, 4], np.uint32))
    for name in ("train.bin", "eval.bin"):
        (tmp_path / name).write_bytes(bytes([0, 1, 2, 3, 4, 0, 1]))
    splits = tokens(str(tmp_path), context=3, vocab_size=64)
    assert splits.facts["vocab_size"] == 64 and whole(splits.eval)["bytes"].tolist() == [6, 5]
    (tmp_path / "eval.bin").write_bytes(bytes([0, 1, 2, 3, 5, 0, 1]))
    refusal = refusal_of(lambda: tokens(str(tmp_path), context=3, vocab_size=64))
    assert refusal.endswith("eval.bin has the token 5 at position 4, expected 0 to 4")


def test_the_mean_bytes_of_a_token_are_those_of_the_file_not_of_the_split_that_it_is_used_for(
    tmp_path: Path,
) -> None:
    facts = {"tokenizer_sha256": "0", "dtype": "uint8", "vocab_size": 5}
    means = {"train_bytes_per_token": 2.0, "eval_bytes_per_token": 3.0}
    (tmp_path / "meta.json").write_text(json.dumps(facts | means))
    train, evaluation, other = (tmp_path / name for name in ("train.bin", "eval.bin", "other.bin"))
    for path in (train, evaluation, other):
        path.write_bytes(bytes([0, 1, 2, 3, 4, 0, 1]))
    swapped = tokens(str(evaluation), str(train), context=3)
    assert [whole(split)["bytes"].tolist() for split in (swapped.train, swapped.eval)] == [[9, 9], [6, 6]]
    assert "bytes" not in whole(tokens(str(train), str(other), context=3).eval)


@pytest.mark.parametrize("lengths", [[0] * 5, [2**62] * 5, [-1, 1, 1, 1, 1], [1] * 4, None])
def test_bytes_of_tokens_that_give_no_bits_per_byte_are_refused(
    tmp_path: Path, lengths: list[int] | None
) -> None:
    for name in ("train.bin", "eval.bin"):
        (tmp_path / name).write_bytes(bytes([0, 1, 2, 3, 4, 0, 1]))
    path = tmp_path / "lengths.npy"
    os.mkfifo(path) if lengths is None else np.save(path, np.array(lengths))
    files = {f"{split}_path": str(tmp_path / f"{split}.bin") for split in ("train", "eval")}
    refusal = refusal_of(
        lambda: tokens(**files, context=3, vocab_size=5, dtype="uint8", token_bytes=str(path))
    )
    assert refusal.startswith(f"data.token_bytes: {path} ") and "integers from 0 to 2^31" in refusal


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes of 20 images, 8 x 4 pixels: black left and right of a centred square of the class's colour."""
    for label, colour in enumerate([(255, 0, 0), (0, 0, 255)]):
        folder = tmp_path / "images" / f"class_{label}" / "deeper"
        folder.mkdir(parents=True)
        for number in range(20):
            image = Image.new("RGB", (8, 4))
            image.paste(colour, (2, 0, 6, 4))
            image.save(folder / f"{number}.png")
        (folder / "notes.txt").write_text("not an image")
    return tmp_path / "images"


def test_image_folders_give_the_centred_square_and_the_folders_class(images: Path) -> None:
    splits = image_folder(str(images), image_size=2, eval_fraction=0.3)
    names = ["class_0", "class_1"]
    assert dict(splits.facts) == {"image_shape": [3, 2, 2], "num_classes": 2, "classes": names}
    assert len(splits.train) + len(splits.eval) == 40
    for batch in (whole(splits.train), whole(splits.eval)):
        assert batch["image"].dtype == torch.float32
        assert set(batch["label"].tolist()) == {0, 1}
        for image, label in zip(batch["image"], batch["label"], strict=True):
            channels = [1.0, -1.0, -1.0] if label == 0 else [-1.0, -1.0, 1.0]
            assert torch.equal(image, torch.tensor(channels).view(3, 1, 1).expand(3, 2, 2))


def test_image_folders_are_read_by_worker_processes(images: Path) -> None:
    dataset = image_folder(str(images), image_size=4).train
    read = [list(batches_of(dataset, 6, 1, 0, 1, 0, 0, 4, num_workers=workers)) for workers in (0, 2)]
    for here, there in zip(*read, strict=True):
        assert torch.equal(here["image"], there["image"])
        assert torch.equal(here["label"], there["label"])


def test_an_evaluation_folder_leaves_all_other_images_to_training(images: Path, tmp_path: Path) -> None:
    for name, grey in (("class_0", 0), ("class_1", 255)):
        folder = tmp_path / "val" / name
        folder.mkdir(parents=True)
        Image.new("L", (4, 4), grey).save(folder / "grey.jpg")
    splits = image_folder(str(images), image_size=4, eval_path=str(tmp_path / "val"))
    assert len(splits.train) == 40
    batch = whole(splits.eval)
    assert batch["label"].tolist() == [0, 1]
    assert torch.equal(batch["image"], torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 4, 4))
    assert not splits.warnings


def test_a_broken_image_is_named(images: Path) -> None:
    for path in images.rglob("*.png"):
        path.write_bytes(b"not a PNG")
    dataset = image_folder(str(images), image_size=4).train
    with pytest.raises(ConfigError, match=r"data\.path: .*\.png cannot be read as an image"):
        dataset.__getitems__([0])


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.bin").touch()
    (tmp_path / "odd.bin").write_bytes(b"123")
    (tmp_path / "text.txt").write_bytes(b"x" * 1000)
    other = tmp_path / "other" / "cat"
    other.mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(other / "1.png")
    dog = tmp_path / "dog" / "dog"
    dog.mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(dog / "1.png")
    names = ["empty", "empty.bin", "odd.bin", "text.txt", "other", "dog", "missing"]
    paths = {name: str(tmp_path / name) for name in names}
    paths["good.bin"] = bin_file(tmp_path / "good.bin", np.arange(101))
    return paths


@pytest.mark.parametrize(
    ("build", "arguments", "key", "also"),
    [
        (
            tokens,
            {"train_path": "missing", "eval_path": "good.bin", "context": 10},
            "data.train_path",
            "missing",
        ),
        (
            tokens,
            {"train_path": "good.bin", "eval_path": "missing", "context": 10},
            "data.eval_path",
            "missing",
        ),
        (
            tokens,
            {"train_path": "empty.bin", "eval_path": "good.bin", "context": 10},
            "data.train_path",
            "0 tokens",
        ),
        (
            tokens,
            {"train_path": "odd.bin", "eval_path": "good.bin", "context": 10},
            "data.train_path",
            "3 bytes",
        ),
        (
            tokens,
            {"train_path": "good.bin", "eval_path": "good.bin", "context": 101},
            "data.train_path",
            "101 tokens",
        ),
        (tokens, {"train_path": "good.bin", "eval_path": "good.bin", "context": 0}, "data.context", "0"),
        (
            tokens,
            {"train_path": "good.bin", "eval_path": "good.bin", "context": 10, "token_bytes": "good.bin"},
            "data.token_bytes",
            "expected a .npy file of at least 1 integers",
        ),
        (
            tokens,
            {"train_path": "good.bin", "eval_path": "good.bin", "dtype": "float32"},
            "data.dtype",
            "float32",
        ),
        (text_files, {"paths": ["text.txt", "missing"]}, "data.paths", "missing"),
        (text_files, {"paths": []}, "data.paths", "empty"),
        (text_files, {"paths": ["text.txt"], "context": 2000}, "data.paths", "2001"),
        (text_files, {"paths": ["text.txt"], "eval_fraction": 1.0}, "data.eval_fraction", "1.0"),
        (python_docs, {"eval_fraction": 0.0}, "data.eval_fraction", "0.0"),
        (python_docs, {"max_bytes": 10}, "data.max_bytes", "tokens"),
        (digits, {"eval_fraction": -0.1}, "data.eval_fraction", "-0.1"),
        (digits, {"label_noise": 1.5}, "data.label_noise", "1.5"),
        (digits, {"seed": -1}, "data.seed", "-1"),
        (image_folder, {"path": "missing", "image_size": 8}, "data.path", "missing"),
        (image_folder, {"path": "empty", "image_size": 8}, "data.path", "empty"),
        (image_folder, {"path": "other", "image_size": 0}, "data.image_size", "0"),
        (image_folder, {"path": "other", "image_size": 8}, "data.path", "too few images (1)"),
        (
            image_folder,
            {"path": "other", "image_size": 8, "eval_path": "missing"},
            "data.eval_path",
            "missing",
        ),
        (image_folder, {"path": "other", "image_size": 8, "eval_path": "dog"}, "data.eval_path", "dog"),
        (
            image_folder,
            {"path": "other", "image_size": 8, "eval_path": "empty"},
            "data.eval_path",
            "no images",
        ),
    ],
)
def test_bad_input_gets_one_line_that_names_the_key(
    build: Any, arguments: dict[str, Any], key: str, also: str, files: dict[str, str]
) -> None:
    def placed(value: Any) -> Any:
        return [placed(item) for item in value] if isinstance(value, list) else files.get(value, value)

    with pytest.raises(ConfigError) as error:
        build(**{name: placed(value) for name, value in arguments.items()})
    message = str(error.value)
    assert message.startswith(f"{key}: ")
    assert also in message
    assert "\n" not in message
