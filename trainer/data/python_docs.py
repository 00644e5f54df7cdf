"""The data set of the text that Python contains: the topics of `help()` and the sources of the standard library.

It is real text that needs no download. Each version of Python has a slightly different text, so compare losses only
between runs with the same version.
"""

import os
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from trainer.data.held_out import check_eval_fraction, hash_fraction, is_held_out
from trainer.data.windows import BYTE_VOCAB, TokenWindows, byte_windows
from trainer.protocols import Splits

# pydoc_data contains the topics again as a source file, so evaluation text would also be in the training text.
_SKIPPED_FOLDERS = {"dist-packages", "idlelib", "pydoc_data", "site-packages", "test", "tests"}
# These files are written when Python is built or installed, so they differ between machines.
_MACHINE_FILES = ("_sysconfigdata", "sitecustomize", "usercustomize")


def python_docs(context: int = 128, eval_fraction: float = 0.1, max_bytes: int = 8_000_000) -> Splits:
    """Load the topics of `help()` and the sources of the standard library as bytes (vocabulary 256).

    A hash of the name of a document decides whether all of it is for training or for evaluation. In each split, topics
    are at most half of the bytes, and sources are the rest; a hash of the names fixes their order. If a reduced
    installation of Python has no topics or no sources, the text consists of the other kind only.

    Args:
        context: number of bytes that the model sees, at least 1; a window has one more.
        eval_fraction: fraction of the text that is kept for evaluation, in (0, 1).
        max_bytes: most bytes of both splits together.

    Raises:
        ConfigError: An argument is out of range, or this Python contains too little text.
    """
    check_eval_fraction(eval_fraction)
    topics, sources = _topics(), _sources()

    def split(word: str, share: float, held_out: bool) -> TokenWindows:
        documents = _first_bytes(_of_split(topics, eval_fraction, held_out), round(max_bytes * share) // 2)
        room = round(max_bytes * share) - sum(map(len, documents))
        documents += _first_bytes(_of_split(sources, eval_fraction, held_out), room)
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
    """Yield the texts of one split in a random but fixed order: the first texts are a fair sample."""
    names = [name for name in documents if is_held_out(name, eval_fraction) == held_out]
    for name in sorted(names, key=lambda name: hash_fraction(f"order of {name}")):
        document = documents[name]
        yield document.read_bytes() if isinstance(document, Path) else document


def _first_bytes(texts: Iterable[bytes], max_bytes: int) -> list[bytes]:
    """Return the first `max_bytes` bytes of the texts; the last text may be cut."""
    parts: list[bytes] = []
    for text in texts:
        if max_bytes <= 0:
            break
        parts.append(text[:max_bytes])
        max_bytes -= len(text)
    return parts
