"""What is found in token files before a run: other formats, other dtypes, and tokens that cannot be."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.makers import refusal_of
from trainer.data import token_files
from trainer.data.tokens import tokens
from trainer.protocols import Splits

LENGTH = 4000
GPT2 = np.random.default_rng(0).integers(0, 50257, LENGTH)
LLAMA = np.random.default_rng(0).integers(0, 128256, LENGTH)


def written(path: Path, values: np.ndarray, dtype: str) -> str:
    if path.suffix == ".npy":
        with path.open("wb") as file:
            np.save(file, values.astype(dtype))
    else:
        values.astype(dtype).tofile(path)
    return str(path)


def splits_of(path: str, dtype: str = "uint16", vocab_size: int | None = None) -> Splits:
    return tokens(path, path, context=10, dtype=dtype, vocab_size=vocab_size)


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32", "int64", ">u2", "uint64"])
@pytest.mark.parametrize("name", ["train.npy", "train.bin"])
def test_a_numpy_file_of_any_name_is_read_as_its_header_says(name: str, dtype: str, tmp_path: Path) -> None:
    path = tmp_path / name
    Path(written(tmp_path / "written.npy", GPT2, dtype)).rename(path)
    splits = splits_of(str(path))
    windows = splits.train.__getitems__(range(len(splits.train)))["tokens"]
    assert torch.equal(windows[:, :-1].flatten(), torch.from_numpy(GPT2[: windows[:, 1:].numel()]))
    assert splits.facts["vocab_size"] == GPT2.max() + 1
    assert splits.warnings[0].startswith(f"data.train_path: {path} is a .npy file: its header's dtype ")


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.ones(100, np.float32), "float32 of shape (100,)"),
        (np.ones((10, 10), np.uint16), "uint16 of shape (10, 10)"),
        (np.array(["a"] * 100), "of shape (100,)"),
        (np.array([{}] * 100), "object"),
        (np.ones(0, np.uint16), "0 tokens"),
        (np.ones(10, np.uint16), "10 tokens, shorter than one window"),
    ],
)
def test_a_numpy_file_of_something_else_is_refused(array: np.ndarray, words: str, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    message = refusal_of(splits_of, f"{tmp_path}/x.npy")
    assert message.startswith(f"data.train_path: {tmp_path}/x.npy")
    assert words.lower() in message.lower()


def test_a_cut_numpy_file_is_refused(tmp_path: Path) -> None:
    path = Path(written(tmp_path / "x.npy", GPT2, "uint16"))
    path.write_bytes(path.read_bytes()[:-100])
    assert refusal_of(splits_of, str(path)).startswith(f"data.train_path: {path}: ")


def test_a_file_of_another_format_is_refused_by_name(tmp_path: Path) -> None:
    raw = GPT2.astype(np.uint16).tobytes()
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, LENGTH
    np.savez(tmp_path / "x.npz", GPT2)
    for content, name in (
        (gzip.compress(raw), ".gz"),
        (header.tobytes() + raw, "llm.c"),
        ((tmp_path / "x.npz").read_bytes(), ".npz"),
    ):
        (tmp_path / "x.bin").write_bytes(content)
        message = refusal_of(splits_of, f"{tmp_path}/x.bin")
        assert message.startswith(f"data.train_path: {tmp_path}/x.bin is a")
        assert name in message


@pytest.mark.parametrize(
    ("values", "dtype", "read_as"),
    [
        (GPT2, "uint32", "uint16"),
        (LLAMA, "uint32", "uint16"),
        (LLAMA, "int64", "uint16"),
        (LLAMA, "int64", "uint32"),
        (LLAMA, "int64", "int32"),
        (LLAMA, "uint32", "uint8"),
        (GPT2, "int64", "uint8"),
        (GPT2 % 65, "uint16", "uint8"),
        (GPT2 % 4, "uint32", "uint16"),
    ],
)
def test_tokens_of_a_wider_dtype_are_recognised_with_the_key_to_set(
    values: np.ndarray, dtype: str, read_as: str, tmp_path: Path
) -> None:
    path = written(tmp_path / "train.bin", values, dtype)
    message = refusal_of(splits_of, path, read_as)
    assert message.startswith(f"data.dtype: data.train_path: {path} looks like {dtype}, not {read_as}: ")
    assert f"set data.dtype={dtype} " in message
    assert splits_of(path, dtype).facts["vocab_size"] == values.max() + 1


@pytest.mark.parametrize("read_as", ["uint32", "int32", "int64"])
def test_tokens_of_a_narrower_dtype_are_refused_as_beyond_any_vocabulary(
    read_as: str, tmp_path: Path
) -> None:
    path = written(tmp_path / "train.bin", GPT2, "uint16")
    message = refusal_of(splits_of, path, read_as)
    assert message.startswith(f"data.dtype: data.train_path: {path}, read as {read_as}, has the token ")


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (GPT2, "uint16"),
        (GPT2 % 4, "uint16"),
        (GPT2 % 65, "uint8"),
        (np.zeros(LENGTH), "uint16"),
        (LLAMA, "uint32"),
        (np.stack([np.resize(GPT2, 20_000), np.arange(20_000) % 3], 1).reshape(-1), "uint16"),  # pairs
    ],
)
def test_tokens_of_the_dtype_in_use_pass(values: np.ndarray, dtype: str, tmp_path: Path) -> None:
    splits_of(written(tmp_path / "train.bin", values, dtype), dtype)


@pytest.mark.parametrize("position", [0, 1, 8191, 8192, 20_000, 39_999, 40_000, 49_999])
@pytest.mark.parametrize("token", [50257, -100])
def test_one_token_outside_the_vocabulary_is_found_wherever_it_is(
    token: int, position: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_files, "_CHUNK", 20_000)
    values = np.random.default_rng(0).integers(0, 50257, 50_000)
    values[position] = token
    path = written(tmp_path / "train.bin", values, "int32")
    message = refusal_of(splits_of, path, "int32", 50257)
    assert message.startswith(
        f"data.vocab_size: data.train_path: {path} has the token {token} at position {position}, "
    )


@pytest.mark.parametrize("text", ["[1]", "5", '{"name": "of another program"}'])
def test_a_meta_json_of_another_program_is_left_alone(tmp_path: Path, text: str) -> None:
    (tmp_path / "meta.json").write_text(text)
    path = written(tmp_path / "train.bin", GPT2, "uint16")
    assert splits_of(path).facts["vocab_size"] == int(GPT2.max()) + 1


def test_the_token_that_a_model_cannot_take_is_named_with_its_position(tmp_path: Path) -> None:
    values = GPT2 % 1000
    values[1234] = 2000
    good = written(tmp_path / "train.bin", GPT2 % 1000, "uint16")
    bad = written(tmp_path / "eval.bin", values, "uint16")
    splits = tokens(good, bad, context=10)
    assert splits.facts["vocab_size"] == 2001
    assert splits.reasons["vocab_size"] == f"data.eval_path: {bad} has the token 2000 at position 1234"
    assert not splits.warnings
    assert splits_of(good).warnings == [f"data.eval_path: {good} is the training file"]


def test_a_path_that_does_not_exist_is_named_with_its_own_key(tmp_path: Path) -> None:
    assert refusal_of(tokens, str(tmp_path / "nowhere")).startswith(
        f"data.train_path: {tmp_path}/nowhere is no file and no folder"
    )
