"""Text files become tokens by one command, and `data=tokens` reads what it wrote without further settings."""

import json
import math
import os
import random
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml

from launch import evaluate, plan
from tests.integration.commands import Warm, command, records, run_to_end
from tests.makers import TINY_GPT
from trainer.data.batches import eval_indices

tokenizers = pytest.importorskip("tokenizers", reason="the test extra is not installed")

WORDS = [f"{first}{middle}{last}é" for first in "abcdefghij" for middle in "aeiou" for last in "klmnopqrst"]
TEXTS = 4
BPE = ("tokenizer=bpe", "vocab=400", "out=corpus", "eval_fraction=0.2", "workers=2")


@pytest.fixture(autouse=True)
def texts(tmp_path: Path) -> None:
    draw = random.Random(0)
    (tmp_path / "texts").mkdir()
    for number in range(TEXTS):
        words = " ".join(draw.choices(WORDS, k=1500))
        (tmp_path / "texts" / f"{number}.txt").write_text(words, encoding="utf-8")


def tokenize(words: Sequence[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return run_to_end(command("texts/*.txt", *words, module="trainer.data.tokenize"), cwd=cwd, check=False)


def test_a_corpus_is_tokenised_with_a_bpe_of_its_own_and_trained(tmp_path: Path, warm: Warm) -> None:
    done = tokenize(["tokenizer=bpe", "vocab=2000", *BPE[2:]], tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"tokenized: {TEXTS} of {TEXTS} files" in done.stderr
    corpus = tmp_path / "corpus"
    meta = json.loads((corpus / "meta.json").read_text())
    tokenizer = tokenizers.Tokenizer.from_file(str(corpus / "tokenizer.json"))
    train, evaluation = (np.fromfile(corpus / f"{split}.bin", meta["dtype"]) for split in ("train", "eval"))
    heads = tokenizer.decode(train.tolist(), skip_special_tokens=False).split("<|endoftext|>")
    tails = tokenizer.decode(evaluation.tolist(), skip_special_tokens=False).split("<|endoftext|>")
    both = [head + tail for head, tail in zip(heads, tails, strict=True)]
    assert both == [*(path.read_text() for path in sorted((tmp_path / "texts").iterdir())), ""]
    size = sum(len(tail.encode()) for tail in tails)
    assert meta["eval_bytes_per_token"] == pytest.approx(size / len(evaluation))
    assert meta["documents"] == TEXTS

    vocab = meta["vocab_size"]
    assert 500 < vocab <= 2000
    small = (
        *("data.context=32", "model.context=32", "model.n_layer=1", "model.n_head=2", "model.n_embd=32"),
        *("trainer.global_batch_size=8", "trainer.eval_samples=16", "trainer.num_threads=1", "logger=none"),
    )
    warm(
        "data=tokens",
        "data.train_path=corpus",
        *small,
        "ema=off",
        "run_dir=run",
        "trainer.steps=2",
        cwd=tmp_path,
    )
    for name in ("tokenizer.json", "meta.json"):
        (corpus / name).unlink()  # the run has the number, and its own data sets are smaller
    frozen = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert frozen["model"]["vocab_size"] == vocab
    resumed = ("resume=run", "trainer.steps=3")
    refused = warm(*resumed, cwd=tmp_path, code=2)
    assert refused.startswith("error: data.eval_path: expected a file, because corpus was not written by")
    (corpus / "meta.json").write_text(json.dumps(meta))
    warm(*resumed, cwd=tmp_path)
    last = records(tmp_path / "run")[-1]
    windows = eval_indices((len(evaluation) - 1) // 32, 16, seed=0)
    assert len(windows) == 16 < (len(evaluation) - 1) // 32
    targets = [evaluation[32 * window + 1 : 32 * window + 33] for window in windows]
    size = sum(len(tokenizer.id_to_token(int(token))) for window in targets for token in window)
    ends = sum(int((window == tokenizer.token_to_id("<|endoftext|>")).sum()) for window in targets)
    bits = last["eval/live/loss"] / math.log(2) * 16 * 32 / (size - ends * len("<|endoftext|>"))
    assert last["eval/live/bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    mean = last["eval/live/loss"] / math.log(2) / meta["eval_bytes_per_token"]
    assert last["eval/live/bits_per_byte"] != pytest.approx(mean, rel=1e-4)

    # A folder of an earlier version has no such table.
    (corpus / "token_bytes.npy").unlink()
    printed = warm("resume=run", "trainer.steps=4", cwd=tmp_path)
    assert (
        "warning: data.train_path: corpus/token_bytes.npy is missing, so bits_per_byte uses the mean"
        in printed
    )
    last = records(tmp_path / "run")[-1]
    mean = last["eval/live/loss"] / math.log(2) / meta["eval_bytes_per_token"]
    assert last["eval/live/bits_per_byte"] == pytest.approx(mean, rel=1e-5)


def test_the_vocabulary_of_other_token_files_is_their_largest_token_with_a_warning(
    tmp_path: Path, warm: Warm
) -> None:
    for name in ("train", "eval"):
        np.random.default_rng(0).integers(0, 300, 2000).astype(np.uint16).tofile(tmp_path / f"{name}.bin")
    files = ("data=tokens", "data.train_path=train.bin", "data.eval_path=eval.bin", "data.context=32")
    small = [override for override in TINY_GPT if not override.startswith("data.")]
    printed = warm(*small, *files, "trainer.steps=1", "run_dir=run", cwd=tmp_path)
    assert (
        "warning: model.vocab_size: 300, because data.train_path: train.bin has the token 299 at" in printed
    )
    frozen = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert frozen["model"]["vocab_size"] == 300
    # Other data of a run changes nothing about its model.
    other = ("data=python_docs", "data.context=32", "data.max_bytes=200000", "trainer.eval_samples=4")
    warm("run", *other, cwd=tmp_path, main=evaluate.main)


def test_a_plan_takes_the_vocabulary_from_the_data_or_asks_for_it(tmp_path: Path, warm: Warm) -> None:
    assert plan.main(["world=1", "data=python_docs", "logger=none"]) == 0
    printed = warm("world=1", "data=tokens", cwd=tmp_path, main=plan.main, code=2)
    assert printed.startswith("error: model.vocab_size: expected a number, because the plan is given no data")


def test_the_same_tokenizer_gives_the_same_tokens_in_any_number_of_workers(tmp_path: Path) -> None:
    assert tokenize(BPE, tmp_path).returncode == 0
    again = [
        "tokenizer=corpus/tokenizer.json",
        "end=<|endoftext|>",
        "out=again",
        "eval_fraction=0.2",
        "workers=1",
    ]
    assert tokenize(again, tmp_path).returncode == 0
    for name in ("train.bin", "eval.bin", "meta.json", "tokenizer.json", "token_bytes.npy"):
        assert (tmp_path / "corpus" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_the_bytes_of_tokens_are_written_only_if_they_add_up_to_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from trainer.data.tokenize import main

    monkeypatch.chdir(tmp_path)
    text = "straße\u0301 <|endoftext|> ok, ok " * 40
    Path("odd.txt").write_text(text, encoding="utf-8")
    Path("plain.txt").write_text(text.replace("<|endoftext|>", "ñ"), encoding="utf-8")
    bpe = ("tokenizer=bpe", "vocab=280", "workers=1", "eval_fraction=0.2")
    assert main(["plain.txt", *bpe, "out=plain"]) == 0
    lengths, tokens = np.load("plain/token_bytes.npy"), np.fromfile("plain/train.bin", np.uint16)
    meta = json.loads(Path("plain/meta.json").read_text())
    assert lengths[tokens].sum() == round(meta["train_bytes_per_token"] * len(tokens))
    assert main(["odd.txt", *bpe, "out=odd"]) == 0  # the text has the token that ends it
    whole = tokenizers.Tokenizer(tokenizers.models.WordLevel({"ok": 0, "?": 1}, unk_token="?"))
    whole.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    whole.save("words.json")
    assert main(["plain.txt", "tokenizer=words.json", *bpe[2:], "out=words"]) == 0
    assert capfd.readouterr().err.count("the bytes of each token are not fixed by this tokenizer") == 2
    assert not Path("odd/token_bytes.npy").exists() and not Path("words/token_bytes.npy").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["tokenizer=nowhere.json", "out=corpus"],
            "tokenizer: nowhere.json: expected bpe or a tokenizer.json",
        ),
        (["tokenizer=texts/0.txt", "out=corpus"], "tokenizer: texts/0.txt: "),
        (["tokenizer=pipe", "out=corpus"], "pipe: expected a regular file, this is a pipe"),
        (["tokenizer=bpe", "vocab=256", "out=corpus"], "vocab: 256 is not at least 257"),
        (["tokenizer=bpe", f"vocab={2**70}", "out=corpus"], f"vocab: {2**70} is above 16777216"),
        (["tokenizer=bpe", "vocab=300", "out=texts"], "out: texts exists already"),
        (["tokenizer=bpe", "vocab=300", "out=corpus.bin"], "out: expected a folder to make, got corpus.bin"),
        (["nowhere*", "tokenizer=bpe", "vocab=300", "out=corpus"], "nowhere*: matches no file"),
        (["bad.bin", *BPE], "bad.bin: 'utf-8' codec"),
        ([*BPE, "vocab=500"], "vocab: is given twice"),
        (["bad.bin", *BPE[:2], "out=wiki.bn"], "bad.bin: 'utf-8' codec"),
        (["./a=b.txt", *BPE], "./a=b.txt: matches no file"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    words: list[str],
    expected: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from trainer.data.tokenize import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.bin").write_bytes(b"\xff\xfe")
    os.mkfifo(tmp_path / "pipe")
    assert main(["texts/*.txt", *words]) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: {expected}")
    assert sorted(os.listdir(tmp_path)) == ["bad.bin", "pipe", "texts"]


def test_a_place_that_cannot_be_written_is_refused_before_a_tokenizer_is_trained(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.data import tokenize as module

    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    monkeypatch.setattr(module, "_tokenizer", lambda *_: pytest.fail("trained first"))
    assert module.main(["texts/*.txt", "tokenizer=bpe", "vocab=300", "out=file/corpus"]) == 2
    assert capfd.readouterr().err.startswith("error: out: file/corpus cannot be made")


def test_an_interrupted_command_leaves_no_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer.data import tokenize as module

    def interrupted(*arguments: object) -> Iterator[object]:
        yield [(b"ab", 1, True), (b"ab", 1, True)]
        assert len(os.listdir(tmp_path)) == 2
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "_encode_all", interrupted)
    assert module.main(["texts/*.txt", *BPE]) == 130
    assert os.listdir(tmp_path) == ["texts"]
