"""Command `python -m trainer.data.tokenize PATTERN… tokenizer=FILE out=FOLDER`: text files become token files."""

import hashlib
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.cli import ending, run_command
from trainer.data.held_out import check_eval_fraction
from trainer.data.token_files import LARGEST_VOCABULARY, TOKEN_BYTES
from trainer.errors import EXIT_BAD_INPUT, EXIT_DONE, ConfigError, blamed_on, unknown_key
from trainer.rundir.files import check_free, looks_like_file, made_aside, read_text
from trainer.shell.commands import named_as_used
from trainer.shell.printable import print_text

HELP = """\
Turn text files into token files for data=tokens: train.bin, eval.bin, tokenizer.json, meta.json and, for byte-level
tokenizers, token_bytes.npy (the bytes of text of each token) in one new folder.

usage: python -m trainer.data.tokenize PATTERN… tokenizer=FILE|bpe out=FOLDER [KEY=VALUE…]

  PATTERN            a text file in UTF-8, or a glob pattern (** goes into subfolders); each file is a document
  tokenizer=…        a tokenizer.json of the library tokenizers, or bpe: train a byte-level BPE on the training text
  vocab=N            with tokenizer=bpe: size of its vocabulary, at least 257
  out=FOLDER         new folder; it appears only when it is complete
  end=TOKEN          token after each document; default none, and <|endoftext|> with tokenizer=bpe
  eval_fraction=0.1  share of each file, at its end, kept for evaluation, in (0, 1)
  workers=N          number of processes; default one per core

examples:
  python -m trainer.data.tokenize 'texts/*.txt' tokenizer=bpe vocab=2000 out=corpus
  python -m trainer data=tokens data.train_path=corpus data.context=128
"""
KEYS = ("tokenizer", "vocab", "out", "end", "eval_fraction", "workers")
FILES = (".bin", ".json", ".npy", ".txt")
"""Suffixes of files that may be meant by the name of a folder."""
END = "<|endoftext|>"
_BYTES = 256
_MAX_DEFINITION = 1 << 28
"""Largest size in bytes of a `tokenizer.json`."""


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(named_as_used(HELP), end="", file=sys.stdout if arguments else sys.stderr)
        return EXIT_DONE if arguments else EXIT_BAD_INPUT
    return run_command(lambda: _tokenize(arguments), arguments)


def _tokenize(arguments: Sequence[str]) -> int:
    settings: dict[str, str] = {}
    patterns: list[str] = []
    for word in arguments:
        key, is_set, value = word.partition("=")
        if not is_set or "/" in key:  # ./a=b.txt is a file
            patterns.append(word)
        elif key in settings:
            raise ConfigError(f"{key}: is given twice")
        else:
            settings[key] = value
    if unknown := [key for key in settings if key not in KEYS]:
        raise ConfigError(unknown_key(unknown[0], KEYS))
    for key in ("tokenizer", "out"):
        if not settings.get(key):
            raise ConfigError(f"{key}: is missing; see --help")
    share = _number(settings, "eval_fraction", "0.1", float)
    check_eval_fraction(share)
    workers = _number(settings, "workers", str(os.cpu_count() or 1), int)
    files = _files(patterns)
    out = Path(settings["out"])
    check_free(out, "out")
    if looks_like_file(settings["out"], FILES):
        raise ConfigError(f"out: expected a folder to make, got {out}; {out}/ makes one of this name")
    with made_aside(out, "out") as folder:  # before the training of a tokenizer, which may take hours
        tokenizer = _tokenizer(settings, files, share)
        end = settings.get("end") or (END if settings["tokenizer"] == "bpe" else None)
        if end is not None and tokenizer.token_to_id(end) is None:
            raise ConfigError(f"end: {end} is not a token of the tokenizer")
        meta = _write(folder, tokenizer, files, share, end, workers)
    print_text(
        f"written: {out} ({meta['train_tokens']:,} + {meta['eval_tokens']:,} tokens of {meta['dtype']})"
    )
    return EXIT_DONE


def _number(settings: dict[str, str], key: str, default: str, kind: type) -> Any:
    text = settings.get(key, default)
    try:
        number = kind(text)
    except ValueError:
        number = 0
    if not number > 0:
        raise ConfigError(f"{key}: expected a number above 0, got {text}")
    return number


def _files(patterns: list[str]) -> list[str]:
    files: set[str] = set()
    for pattern in patterns:
        found = [path for path in glob(pattern, recursive=True) if os.path.isfile(path)]
        if not found:
            raise ConfigError(f"{pattern}: matches no file")
        files.update(found)
    if not files:
        raise ConfigError("expected text files or glob patterns; see --help")
    return sorted(files)


def _parts(path: str, share: float) -> tuple[str, str]:
    """Return the training text and the evaluation text of a file."""
    with blamed_on(path):
        text = Path(path).read_bytes().decode()
    cut = len(text) - round(len(text) * share)
    return text[:cut], text[cut:]


def _tokenizer(settings: dict[str, str], files: list[str], share: float) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ConfigError(
            "tokenizer: needs the library tokenizers: pip install -c constraints.txt -e '.[tokenizers]'"
        ) from error
    if settings["tokenizer"] != "bpe":
        if "vocab" in settings:
            raise ConfigError("vocab: expected only with tokenizer=bpe")
        with blamed_on(f"tokenizer: {settings['tokenizer']}"):
            if not Path(settings["tokenizer"]).exists():
                raise ValueError("expected bpe or a tokenizer.json, found no such file")
            return tokenizers.Tokenizer.from_str(read_text(Path(settings["tokenizer"]), _MAX_DEFINITION))
    size = _number(settings, "vocab", "0", int)
    if size <= _BYTES:
        raise ConfigError(f"vocab: {size} is not at least {_BYTES + 1}: the bytes and {END}")
    if size > LARGEST_VOCABULARY:  # the library takes memory for all of them, or panics
        raise ConfigError(f"vocab: {size} is above {LARGEST_VOCABULARY}")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    count = f"{len(files):,} file{'s'[: len(files) != 1]}"
    print_text(f"training a BPE of {size:,} tokens on {count}", error=True)
    tokenizer.train_from_iterator((_parts(path, share)[0] for path in files), trainer)
    return tokenizer


_worker: dict[str, Any] = {}


def _token_bytes(tokenizer: Any, end: str | None) -> npt.NDArray[np.uint32] | None:
    """Return the number of bytes of text of each token, `[vocab_size]`; None if the tokenizer is not byte-level.

    The token `end` has none, because the command adds it to the text.
    """
    decoder = json.loads(tokenizer.to_str())["decoder"] or {}
    if all(part.get("type") != "ByteLevel" for part in [decoder, *decoder.get("decoders", [])]):
        return None
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    lengths = np.zeros(1 + max(vocabulary.values()), np.uint32)
    added = tokenizer.get_added_tokens_decoder()
    for token, number in vocabulary.items():
        # In the vocabulary of such a tokenizer a character is a byte; added tokens are plain text.
        lengths[number] = len(token.encode()) if number in added else len(token)
    if end is not None:
        lengths[tokenizer.token_to_id(end)] = 0
    return lengths


def _start_worker(
    tokenizer: str, share: float, end: str | None, dtype: str, lengths: npt.NDArray[np.uint32] | None
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command ends its workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import tokenizers

    _worker.update(
        tokenizer=tokenizers.Tokenizer.from_str(tokenizer), share=share, dtype=dtype, lengths=lengths
    )
    _worker["end"] = [] if end is None else [_worker["tokenizer"].token_to_id(end)]


def _encoded(path: str) -> list[tuple[bytes, int, bool]]:
    """Encode both parts of a file.

    Returns:
        For each part its tokens, the number of bytes of its text, and whether the table of the tokens has as many.
    """
    found = []
    lengths = _worker["lengths"]
    for text in _parts(path, _worker["share"]):
        ids = _worker["tokenizer"].encode(text, add_special_tokens=False).ids
        ids += _worker["end"] if text else []
        size = len(text.encode())
        agrees = lengths is not None and int(lengths[ids].sum(dtype=np.int64)) == size
        found.append((np.array(ids, _worker["dtype"]).tobytes(), size, agrees))
    return found


def _write(
    folder: Path, tokenizer: Any, files: list[str], share: float, end: str | None, workers: int
) -> dict[str, Any]:
    """Write all files of the corpus, and return the contents of `meta.json`."""
    definition = tokenizer.to_str(pretty=True)
    vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
    if vocab_size > LARGEST_VOCABULARY:
        raise ConfigError(
            f"tokenizer: its largest token is {vocab_size - 1}, expected less than {LARGEST_VOCABULARY}"
        )
    dtype = "uint16" if vocab_size <= 2**16 else "uint32"
    (folder / "tokenizer.json").write_text(definition, encoding="utf-8")
    names = ("train", "eval")
    tokens, sizes, is_exact = [0, 0], [0, 0], True
    lengths = _token_bytes(tokenizer, end)
    with (folder / "train.bin").open("wb") as train, (folder / "eval.bin").open("wb") as evaluation:
        for parts in _encode_all(files, min(workers, len(files)), (definition, share, end, dtype, lengths)):
            for split, (data, size, agrees) in enumerate(parts):
                (train, evaluation)[split].write(data)
                tokens[split] += len(data) // np.dtype(dtype).itemsize
                sizes[split] += size
                is_exact = is_exact and agrees
    for split, name in enumerate(names):
        if not tokens[split]:
            raise ConfigError(f"{files[0]}: the text is too short: no tokens for {name}.bin")
    if lengths is not None and is_exact:
        np.save(folder / TOKEN_BYTES, lengths)
    else:
        print_text(
            "the bytes of each token are not fixed by this tokenizer: bits per byte will use their mean",
            error=True,
        )
    meta: dict[str, Any] = {
        "dtype": dtype,
        "vocab_size": vocab_size,
        "tokenizer_sha256": hashlib.sha256(definition.encode()).hexdigest(),
        "documents": len(files),
        "end": end,
    }
    for split, name in enumerate(names):
        meta |= {f"{name}_tokens": tokens[split], f"{name}_bytes_per_token": sizes[split] / tokens[split]}
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    return meta


def _encode_all(files: list[str], workers: int, settings: tuple[Any, ...]) -> Iterator[Any]:
    """Yield what `_encoded` returns for each file, in order, and show how many are done."""
    # Forked processes would inherit the threads of the library in an unknown state.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, settings) as pool:
        try:
            for done, parts in enumerate(pool.map(_encoded, files), 1):
                if sys.stderr.isatty() or done == len(files):
                    print(
                        f"\rtokenized: {done:,} of {len(files):,} files", end="", file=sys.stderr, flush=True
                    )
                yield parts
        except BrokenProcessPool as error:
            raise ConfigError(
                "workers: a process ended, perhaps for lack of memory; set fewer of them"
            ) from error
    print(file=sys.stderr)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(ending(lambda: main(sys.argv[1:])))
