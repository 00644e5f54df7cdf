"""The text that ships with Python itself: the reference behind `help()` and the standard library's sources.

Real text that is there wherever this code runs. Another version of Python has a slightly different text, so
losses are compared between runs on one version.
"""

import os
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from trainer.data.held_out import check_eval_fraction, hash_fraction, is_held_out
from trainer.data.windows import BYTE_VOCAB, TokenWindows, byte_windows
from trainer.protocols import Splits

# pydoc_data repeats the topics as a source file, which would put evaluation text into training.
_SKIPPED_FOLDERS = {"dist-packages", "idlelib", "pydoc_data", "site-packages", "test", "tests"}
# Written at build or install time, so they differ between machines with the same Python.
_MACHINE_FILES = ("_sysconfigdata", "sitecustomize", "usercustomize")


def python_docs(context: int = 128, eval_fraction: float = 0.1, max_bytes: int = 8_000_000) -> Splits:
    """Bytes (vocabulary 256) of the topics of `help()` and of the standard library's sources.

    Whole documents go to training or evaluation, by a hash of their name. In each of the two, topics fill up
    to half of the bytes, and sources, in an order fixed by their names, the rest. Either may be missing from
    a trimmed-down Python, and then the other is all there is.

    Args:
        context: bytes a model sees; a window has one more.
        eval_fraction: share of the text kept for evaluation, in (0, 1).
        max_bytes: most bytes taken in all.

    Raises:
        ConfigError: an argument is out of range, or this Python ships too little text.
    """
    check_eval_fraction(eval_fraction)
    topics, sources = _topics(), _sources()

    def split(word: str, share: float, held_out: bool) -> TokenWindows:
        documents = _taken(_of_split(topics, eval_fraction, held_out), round(max_bytes * share) // 2)
        room = round(max_bytes * share) - sum(map(len, documents))
        documents += _taken(_of_split(sources, eval_fraction, held_out), room)
        return byte_windows(documents, context, f"data.max_bytes: {word} text of this Python")

    return Splits(
        split("training", 1 - eval_fraction, held_out=False),
        split("evaluation", eval_fraction, held_out=True),
        {"vocab_size": BYTE_VOCAB, "context": context},
    )


def _topics() -> dict[str, bytes]:
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError:
        return {}
    return {f"topics/{name}": text.encode() for name, text in topics.items()}


def _sources() -> dict[str, Path]:
    root = Path(sysconfig.get_path("stdlib"))
    paths = {}
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        for name in files:
            if name.endswith(".py") and not name.startswith(_MACHINE_FILES):
                path = Path(folder, name)
                paths[path.relative_to(root).as_posix()] = path
    return paths


def _of_split(
    documents: dict[str, bytes] | dict[str, Path], eval_fraction: float, held_out: bool
) -> Iterator[bytes]:
    """The texts of one split, in an order that makes any first part of them a fair sample."""
    names = [name for name in documents if is_held_out(name, eval_fraction) == held_out]
    for name in sorted(names, key=lambda name: hash_fraction(f"order of {name}")):
        document = documents[name]
        yield document.read_bytes() if isinstance(document, Path) else document


def _taken(texts: Iterable[bytes], max_bytes: int) -> list[bytes]:
    taken: list[bytes] = []
    for text in texts:
        if max_bytes <= 0:
            break
        taken.append(text[:max_bytes])
        max_bytes -= len(text)
    return taken
