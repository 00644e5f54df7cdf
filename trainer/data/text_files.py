"""The user's own text files, as bytes."""

from glob import glob
from pathlib import Path

from trainer.data.held_out import check_eval_fraction
from trainer.data.windows import BYTE_VOCAB, byte_windows
from trainer.errors import ConfigError
from trainer.protocols import Splits


def text_files(paths: list[str], context: int = 128, eval_fraction: float = 0.1) -> Splits:
    """Bytes (vocabulary 256) of the files that `paths` match; the end of each file is kept for evaluation.

    Args:
        paths: files or glob patterns (`corpus/**/*.txt`); a file that two of them match is read once.
        context: bytes a model sees; a window has one more.
        eval_fraction: share of each file, at its end, kept for evaluation, in (0, 1).

    Raises:
        ConfigError: a pattern matches no file, the text is too short, or an argument is out of range.
    """
    check_eval_fraction(eval_fraction)
    if not paths:
        raise ConfigError("data.paths: is empty, expected files or glob patterns")
    found: set[Path] = set()
    for pattern in paths:
        matches = {path.resolve() for path in map(Path, glob(pattern, recursive=True)) if path.is_file()}
        if not matches:
            raise ConfigError(f"data.paths: {pattern} matches no file")
        found |= matches
    texts = [path.read_bytes() for path in sorted(found)]
    cuts = [len(text) - round(len(text) * eval_fraction) for text in texts]
    heads = [text[:cut] for text, cut in zip(texts, cuts, strict=True)]
    tails = [text[cut:] for text, cut in zip(texts, cuts, strict=True)]
    return Splits(
        byte_windows(heads, context, "data.paths: training text"),
        byte_windows(tails, context, "data.paths: evaluation text"),
        {"vocab_size": BYTE_VOCAB, "context": context},
    )
