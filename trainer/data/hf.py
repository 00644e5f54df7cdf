"""The data set of files of the library `datasets`: a folder of `save_to_disk`, or Parquet or Arrow files."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from trainer.data.augmentation import Change, augmented_by
from trainer.data.decoding import check_image_size, square_of
from trainer.data.held_out import check_eval_fraction, split_rows
from trainer.data.hf_columns import Column, find_column
from trainer.data.hf_files import TRAIN, Source, find_source
from trainer.data.overlap import repeated_files, shared_files
from trainer.errors import ConfigError, listed
from trainer.protocols import Batch, Splits

Columns = Mapping[str, Column]

_CHECKED_ROWS = 1024
"""Most rows that are read to look for floats that are not finite."""


class HfRows:
    """Data set of rows of Arrow files; only the pages that a batch needs are read.

    Each process that gets a copy opens the files itself.

    Args:
        source: files.
        columns: column of each field of a batch.
        image_size: height and width of the pictures in pixels; not used without pictures.
        rows: rows that belong to the split, int64 `[samples]`.
    """

    def __init__(
        self, source: Source, columns: Columns, image_size: int, rows: npt.NDArray[np.int64]
    ) -> None:
        self._source, self._columns, self._image_size, self.rows = source, columns, image_size, rows
        names = list(dict.fromkeys(column.name for column in columns.values()))
        self._table = source.open().with_format("arrow", columns=names)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._source, self._columns, self._image_size, self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return the batch: each field, int64 or float32 `[b, ...]`; pictures float32 `[b, 3, size, size]` in [-1, 1].

        Raises:
            ConfigError: A picture cannot be decoded.
        """
        return self.batch(indices)

    def batch(self, indices: Sequence[int], change: Change | None = None) -> Batch:
        """Return the batch of `__getitems__` with changed pictures (`trainer.data.augmentation.Pictures`)."""
        rows = self.rows[np.asarray(indices, np.int64)]
        table = self._table[rows]
        batch: dict[str, torch.Tensor] = {}
        for field, column in self._columns.items():
            if column.kind != "pictures":
                batch[field] = column.read(table)
                continue
            images = []
            for number, image in enumerate(column.pictures(table, rows)):
                if change is not None:
                    image = change(number, image, f"row {rows[number]} of {column.name}")
                images.append(square_of(image, self._image_size))
            batch[field] = torch.stack(images)
        return batch

    def check(self) -> None:
        """Read the floats of rows spread evenly over the split, and refuse those that are not finite.

        Raises:
            ConfigError: There is such a value; the message names the column and the row.
        """
        floats = [column for column in self._columns.values() if column.kind == "floats"]
        if not floats:
            return
        count = min(len(self), _CHECKED_ROWS)
        spread = self.rows[np.linspace(0, len(self) - 1, count, dtype=np.int64)]
        for rows in np.array_split(spread, min(count, 16)):
            table = self._table[rows]
            for column in floats:
                finite = column.read(table).isfinite().view(len(rows), -1).all(1)
                if not finite.all():
                    row = rows[~finite.numpy()][0]
                    raise ConfigError(
                        f"{column.origin} has a value in row {row} that is not finite in float32"
                    )


def hf(
    path: str | Sequence[str],
    columns: dict[str, str],
    split: str = TRAIN,
    eval_path: str | Sequence[str] | None = None,
    eval_split: str | None = None,
    eval_fraction: float = 0.1,
    image_size: int | None = None,
    transforms: Sequence[Callable[..., Any]] | None = None,
    num_classes: int | None = None,
    vocab_size: int | None = None,
) -> Splits:
    """Load columns of a folder of `save_to_disk`, or of Parquet or Arrow files, as the fields of a batch.

    Args:
        path: folder; or a path or glob pattern of Parquet or Arrow files, or a list of them.
        columns: name of the column by the name of the field, such as `{image: img, label: label}` or
            `{tokens: input_ids}`.
        split: training split of a folder that has several.
        eval_path: the same as `path` for the evaluation split; None takes it from `path`.
        eval_split: evaluation split of a folder that has several; None keeps a share of the rows of `split`, unless
            `eval_path` is given.
        eval_fraction: expected share of the rows that is kept for evaluation, in (0, 1); a hash of the row's number
            decides. Not used with `eval_path` or `eval_split`.
        image_size: height and width of the pictures in pixels, 1 to 10,000; needed for a column of pictures.
        transforms: callables (`trainer.data.augmentation`) that change each training picture; None changes nothing.
        num_classes: number of classes, above every `label`; None takes that of the column, else the largest + 1.
        vocab_size: number of token ids, above all `tokens`; None takes the largest + 1.

    Raises:
        ConfigError: The package `datasets`, a file, a split or a column is missing, a column is of a wrong type or its
            rows differ in length, or an argument is out of range.
    """
    check_eval_fraction(eval_fraction)
    if image_size is not None:
        check_image_size(image_size)
    if not isinstance(columns, dict) or not columns:
        raise ConfigError("data.columns: expected columns by field, such as {image: img, label: label}")
    source = find_source(path, split, "data.path", "data.split")
    found = _found(source, columns, image_size)
    rows = np.arange(len(source.open()))
    warnings: list[str] = []
    if eval_path is None and eval_split is None:
        of_eval, eval_columns = source, found
        if repeated := repeated_files(source.files):
            warnings = [
                f"data.path: there more than once, so rows of them may be in both splits: {listed(repeated)}"
            ]
        rows, eval_rows = split_rows(
            len(rows), eval_fraction, f"data.path: {source.place} has too few rows ({len(rows)})"
        )
    else:
        place, key = (path, "data.path") if eval_path is None else (eval_path, "data.eval_path")
        of_eval = find_source(place, eval_split, key, "data.eval_split")
        eval_columns = _found(of_eval, columns, image_size)
        eval_rows = np.arange(len(of_eval.open()))
        _check_alike(found, eval_columns)
        warnings = _shared_files(source, of_eval, key)
    if transforms and all(column.kind != "pictures" for column in found.values()):
        raise ConfigError("data.transforms: expected a column of pictures in data.columns")
    train_rows = HfRows(source, found, image_size or 0, rows)
    train = augmented_by(transforms, train_rows)
    evaluation = HfRows(of_eval, eval_columns, image_size or 0, eval_rows)
    for part in (train_rows, evaluation):
        part.check()
    facts, reasons = _facts(found, eval_columns, image_size or 0, num_classes, vocab_size)
    return Splits(train, evaluation, facts, warnings, reasons)


def _shared_files(source: Source, of_eval: Source, key: str) -> list[str]:
    """Return a warning if files of the evaluation split are in the training split too."""
    shared = shared_files(source.files, of_eval.files)
    if not shared:
        return []
    return [
        f"{key}: of {len(of_eval.files)} files of the evaluation split {of_eval.place}, {len(shared)} are"
        " in the training split too"
    ]


def _found(source: Source, columns: Mapping[str, str], image_size: int | None) -> Columns:
    dataset = source.open()
    found = {
        field: find_column(dataset, name, f"data.columns.{field}", source.place)
        for field, name in columns.items()
    }
    for column in found.values():
        if column.kind == "pictures" and image_size is None:
            raise ConfigError(
                f"data.image_size: expected a number of pixels, because {column.origin} has pictures"
            )
    return found


def _check_alike(train: Columns, evaluation: Columns) -> None:
    for field, column in evaluation.items():
        other = train[field]
        if (column.shape, column.kind) != (other.shape, other.kind):
            raise ConfigError(
                f"{column.origin} has {column.kind} of shape {list(column.shape)}, expected {other.kind} of shape"
                f" {list(other.shape)} as the training split has"
            )
        if column.classes != other.classes:
            raise ConfigError(f"{column.origin} has other classes than the training split")


def _facts(
    train: Columns, evaluation: Columns, image_size: int, num_classes: int | None, vocab_size: int | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the facts of the fields `image`, `label` and `tokens`, and their reasons."""
    facts: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    if (image := train.get("image")) is not None:
        if image.kind == "integers":
            raise ConfigError(f"{image.origin} has integers, expected pictures or floats")
        if image.kind == "pictures":
            facts["image_shape"] = [3, image_size, image_size]
        elif len(image.shape) == 3:
            facts["image_shape"] = list(image.shape)
    label = _largest("label", 0, "data.num_classes", num_classes, train, evaluation)
    if label is not None:
        classes = train["label"].classes
        facts["num_classes"] = num_classes or len(classes) or label.largest + 1
        facts |= {"classes": list(classes)} if classes else {}
    token = _largest("tokens", 1, "data.vocab_size", vocab_size, train, evaluation)
    if token is not None:
        facts |= {"context": train["tokens"].shape[0] - 1, "vocab_size": vocab_size or token.largest + 1}
        if not facts["context"]:
            raise ConfigError(f"{train['tokens'].origin} has one token in a row, expected at least 2")
        if vocab_size is None:
            reasons["vocab_size"] = f"{token.origin} has the token {token.largest}"
    return facts, reasons


def _largest(
    field: str, dimensions: int, key: str, count: int | None, train: Columns, evaluation: Columns
) -> Column | None:
    """Return the column with the largest number of a field of labels or tokens; None without such a field.

    A row must have `dimensions` dimensions. Every number must be below `count`, the value of the config key `key`; None
    sets no bound.
    """
    if field not in train:
        if count is not None:
            raise ConfigError(f"{key}: expected a field {field} in data.columns")
        return None
    for column in (train[field], evaluation[field]):
        if column.kind != "integers" or len(column.shape) != dimensions:
            expected = "a list of integers" if dimensions else "one integer"
            raise ConfigError(
                f"{column.origin} has {column.kind} of shape {list(column.shape)}, expected {expected} in a row"
            )
        if column.smallest < 0:
            raise ConfigError(f"{column.origin} has {column.smallest}, expected 0 or more")
    column = max((train[field], evaluation[field]), key=lambda column: column.largest)
    limit = count or len(column.classes)
    if limit and column.largest >= limit:
        raise ConfigError(f"{key}: {limit} is not above {column.largest}, which {column.origin} has")
    return column
