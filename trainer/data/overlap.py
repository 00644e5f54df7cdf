"""Find files that are in the training split and in the evaluation split, and files that are there more than once."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from trainer.data.held_out import hash_fraction

MOST_EVAL, MOST_TRAIN = 2_000, 20_000
"""Largest number of files of each split that are compared; of more, a fixed sample."""
_BLOCK = 4096


def shared_files(train: Sequence[str], evaluation: Sequence[str]) -> list[str]:
    """Return the evaluation files that are training files too, whatever the names by which they are reached."""
    in_train = set(map(os.path.realpath, train))
    return [path for path in evaluation if os.path.realpath(path) in in_train]


def repeated_files(paths: Sequence[str]) -> list[str]:
    """Return the files that are there more than once, whatever the names by which they are reached, each once."""
    places = list(map(os.path.realpath, paths))
    first = dict(zip(reversed(places), reversed(paths), strict=True))
    return [first[place] for place, count in Counter(places).items() if count > 1]


def same_files(train: Sequence[str], evaluation: Sequence[str]) -> list[tuple[str, str]]:
    """Return each evaluation file whose bytes a training file has too, with that training file.

    Bytes are read only of files that have the same size, and whole files only if a block from the middle is the same.

    Args:
        train: paths of the training split.
        evaluation: paths of the evaluation split.

    Raises:
        OSError: a file cannot be read.
    """
    left, right = _sample(train, MOST_TRAIN), _sample(evaluation, MOST_EVAL)
    for trait in (os.path.getsize, _block):
        left, right = _alike(left, right, trait)
    in_train = {_digest(path): path for path in reversed(left)}
    return [(path, in_train[digest]) for path in right if (digest := _digest(path)) in in_train]


def _sample(paths: Sequence[str], most: int) -> list[str]:
    if len(paths) <= most:
        return list(paths)
    return sorted(paths, key=lambda path: hash_fraction(os.path.basename(path)))[:most]


def _alike(left: list[str], right: list[str], trait: Callable[[str], Any]) -> tuple[list[str], list[str]]:
    """Return the paths of each list whose trait a path of the other list has too; an empty file has none."""
    of_left, of_right = ([(trait(path), path) for path in paths] for paths in (left, right))
    both = {value for value, _ in of_left if value} & {value for value, _ in of_right}
    return [path for value, path in of_left if value in both], [
        path for value, path in of_right if value in both
    ]


def _block(path: str) -> bytes:
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - _BLOCK) // 2)
        return file.read(_BLOCK)


def _digest(path: str) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
