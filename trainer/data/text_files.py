"""The data set of the user's own text files, as bytes."""

from glob import glob
from pathlib import Path

from trainer.data.held_out import check_eval_fraction
from trainer.data.windows import BYTE_VOCAB, byte_windows
from trainer.errors import ConfigError
from trainer.protocols import Splits


def text_files(paths: list[str], context: int = 128, eval_fraction: float = 0.1) -> Splits:
    """Load the files that `paths` match, as bytes (vocabulary 256); the end of each file is kept for evaluation.

    Args:
        paths: files or glob patterns (`corpus/**/*.txt`); a file that matches several patterns is read once.
        context: number of bytes that the model sees, at least 1; a window has one more.
        eval_fraction: fraction of each file, at its end, that is kept for evaluation, in (0, 1).

    Raises:
        ConfigError: A pattern matches no file, the text is too short, or an argument is out of range.
    """
    check_eval_fraction(eval_fraction)
    if not paths:
        raise ConfigError("data.paths: is empty, expected files or glob patterns")
    files: set[Path] = set()
    for pattern in paths:
        matches = {path.resolve() for path in map(Path, glob(pattern, recursive=True)) if path.is_file()}
        if not matches:
            raise ConfigError(f"data.paths: {pattern} matches no file")
        files |= matches
    texts = [path.read_bytes() for path in sorted(files)]
    cuts = [len(text) - round(len(text) * eval_fraction) for text in texts]
    heads = [text[:cut] for text, cut in zip(texts, cuts, strict=True)]
    tails = [text[cut:] for text, cut in zip(texts, cuts, strict=True)]
    return Splits(
        byte_windows(heads, context, "data.paths: training text"),
        byte_windows(tails, context, "data.paths: evaluation text"),
        {"vocab_size": BYTE_VOCAB, "context": context},
    )
