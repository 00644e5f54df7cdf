"""The data set of the user's own arrays: memory-mapped `.npy` files, such as latents or features with their labels."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainer.data.held_out import check_eval_fraction, split_rows
from trainer.data.matching import matching_files
from trainer.data.npy import is_npy, map_npy
from trainer.data.overlap import repeated_files, shared_files
from trainer.errors import ConfigError, blamed_on, listed
from trainer.protocols import Batch, Splits

Fields = Mapping[str, str | Sequence[str]]

_CHECKED_BYTES = 2**26
"""Most bytes of one file that are read to look for values that are not finite."""


class Field:
    """One field of all samples: the rows of one or several files, one file after the other.

    Args:
        paths: `.npy` files of one dtype, arrays `[rows, ...]` with equal shapes of a row.
        origin: config key of the field, for error messages.
        shift: number that is subtracted from each value; None leaves integers as they are.
        scale: factor of each value after that; None as for `shift`.

    Raises:
        ConfigError: A file is missing, damaged, of another format or dtype, or does not fit the first file.
    """

    def __init__(self, paths: Sequence[str], origin: str, shift: float | None, scale: float | None) -> None:
        self.paths, self.origin = list(paths), origin
        self._shift, self._scale = shift, scale
        self._files = [_mapped(path, origin) for path in paths]
        first = self._files[0]
        for path, file in zip(paths[1:], self._files[1:], strict=True):
            if (file.dtype, file.shape[1:]) != (first.dtype, first.shape[1:]):
                raise ConfigError(
                    f"{origin}: {path} has {_row(file)}, expected {_row(first)}, as {paths[0]} has"
                )
        self.lengths = [len(file) for file in self._files]
        self._ends = np.cumsum(self.lengths)
        self.shape, self.row = first.shape[1:], _row(first)
        self.is_whole = first.dtype.kind in "iu" and shift is None and scale is None
        """Whether the values are integers, int64 in a batch; else float32."""

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, rows: npt.NDArray[np.int64]) -> Tensor:
        """Return the values of these rows, int64 or float32 `[rows, ...]`."""
        values = np.empty((len(rows), *self.shape), np.int64 if self.is_whole else np.float32)
        numbers = np.searchsorted(self._ends, rows, side="right")
        for number in np.unique(numbers):
            of_file = numbers == number
            first = self._ends[number] - self.lengths[number]
            values[of_file] = self._converted(self._files[number][rows[of_file] - first])
        return torch.from_numpy(values)

    def check(self) -> None:
        """Read rows of each file, spread evenly over it, and refuse values that are not finite.

        Raises:
            ConfigError: There is such a value; the message names the file and the row.
        """
        if self.is_whole:
            return
        for path, file in zip(self.paths, self._files, strict=True):
            row_bytes = max(1, file.nbytes // len(file))
            count = min(len(file), max(2, _CHECKED_BYTES // row_bytes))
            rows = np.linspace(0, len(file) - 1, count, dtype=np.int64)
            for part in np.array_split(rows, min(count, 16)):
                values = self._converted(file[part])
                finite = np.isfinite(values).reshape(len(part), -1).all(1)
                if not finite.all():
                    raise ConfigError(
                        f"{self.origin}: {path} has a value in row {part[finite.argmin()]} that is not finite in"
                        " float32"
                    )

    def _converted(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if self.is_whole:
            return values.astype(np.int64)
        with np.errstate(over="ignore"):
            if self._shift is None and self._scale is None:
                return values.astype(np.float32)
            return (
                (values.astype(np.float64) - (self._shift or 0)) * (1 if self._scale is None else self._scale)
            ).astype(np.float32)


def _mapped(path: str, origin: str) -> npt.NDArray[Any]:
    if not Path(path).is_file():
        raise ConfigError(f"{origin}: {path} is not a file")
    with blamed_on(f"{origin}: {path}"):
        if not is_npy(path):
            raise ConfigError(f"{origin}: {path} is not a .npy file")
        array = map_npy(path)
    if array.dtype.kind not in "fiu" or array.dtype in (np.uint64, np.longdouble):
        raise ConfigError(f"{origin}: {path} has {array.dtype}, expected floats or integers up to int64")
    if array.ndim == 0 or 0 in array.shape:
        raise ConfigError(f"{origin}: {path} has shape {array.shape}, expected at least one row with values")
    return array


def _row(array: npt.NDArray[Any]) -> str:
    return f"rows of {array.dtype} of shape {array.shape[1:]}"


class Arrays:
    """Data set of rows of arrays; only the pages that a batch needs are read.

    Each worker process of a DataLoader maps the files itself, because pickling a memory map would copy the files.

    Args:
        fields: files of each field, by its name in a batch.
        key: config key of `fields`, for error messages.
        shift: number to subtract from the values, by field.
        scale: factor of the values after that, by field.
        rows: rows that belong to the split, int64 `[samples]`; None for all.

    Raises:
        ConfigError: Files are missing or do not fit together.
    """

    def __init__(
        self,
        fields: Fields,
        key: str,
        shift: Mapping[str, float],
        scale: Mapping[str, float],
        rows: npt.NDArray[np.int64] | None = None,
    ) -> None:
        self.fields = {
            name: Field(
                matching_files(paths, f"{key}.{name}"), f"{key}.{name}", shift.get(name), scale.get(name)
            )
            for name, paths in fields.items()
        }
        # The files, not the patterns: a file that is added later must not change the rows of a worker.
        self._arguments = ({name: field.paths for name, field in self.fields.items()}, key, shift, scale)
        _check_lengths(list(self.fields.values()))
        self.rows = np.arange(len(next(iter(self.fields.values())))) if rows is None else rows

    def __reduce__(self) -> tuple[Any, ...]:
        return Arrays, (*self._arguments, self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return the batch: each field, int64 or float32 `[b, ...]`."""
        rows = self.rows[np.asarray(indices)]
        return {name: field.read(rows) for name, field in self.fields.items()}

    def part(self, rows: npt.NDArray[np.int64]) -> "Arrays":
        """Return the data set of these rows."""
        return Arrays(*self._arguments, rows)


def _check_lengths(fields: list[Field]) -> None:
    first = fields[0]
    for field in fields[1:]:
        if len(field) != len(first):
            raise ConfigError(
                f"{field.origin}: {len(field)} rows, expected {len(first)}, as {first.origin} has"
            )
        if len(field.lengths) == len(first.lengths) and field.lengths != first.lengths:
            at = [a != b for a, b in zip(field.lengths, first.lengths, strict=True)].index(True)
            raise ConfigError(
                f"{field.origin}: {field.paths[at]} has {field.lengths[at]} rows, expected {first.lengths[at]}, as"
                f" {first.paths[at]} has"
            )


def arrays(
    fields: dict[str, Any],
    eval_fields: dict[str, Any] | None = None,
    eval_fraction: float = 0.1,
    shift: dict[str, float] | None = None,
    scale: dict[str, float] | None = None,
    num_classes: int | None = None,
) -> Splits:
    """Load named fields from `.npy` files: floats become float32, integers int64.

    Args:
        fields: path or glob pattern, or a list of them, by the name of the field in a batch, such as `image` and
            `label`. Several files of a field are read one after the other.
        eval_fields: the same for the evaluation split; None keeps a share of the rows of `fields` for it.
        eval_fraction: expected share of the rows that is kept for evaluation, in (0, 1); a hash of the row's number
            decides. Not used with `eval_fields`.
        shift: number that is subtracted from all values, by field.
        scale: factor of the values after that, by field; such a field is float32.
        num_classes: number of classes, above every label; None takes the largest `label` + 1.

    Raises:
        ConfigError: Files are missing, damaged, do not fit together or have values that are not finite, or an argument
            is out of range.
    """
    check_eval_fraction(eval_fraction)
    shift, scale = shift or {}, scale or {}
    _check_names(fields, eval_fields, shift, scale)
    train = Arrays(fields, "data.fields", shift, scale)
    if eval_fields is not None:
        evaluation = Arrays(eval_fields, "data.eval_fields", shift, scale)
        _check_alike(train, evaluation)
        warnings = _shared(train, evaluation)
    else:
        warnings = _repeated(train)
        too_few = f"data.fields: {len(train)} rows are too few"
        train, evaluation = map(train.part, split_rows(len(train), eval_fraction, too_few))
    for split in (train, evaluation) if eval_fields is not None else (train,):
        for field in split.fields.values():
            field.check()
    return Splits(train, evaluation, _facts(train, evaluation, num_classes), warnings)


def _check_names(
    fields: Any, eval_fields: Any, shift: Mapping[str, float], scale: Mapping[str, float]
) -> None:
    if not isinstance(fields, dict) or not fields:
        raise ConfigError(
            "data.fields: expected paths by field, such as {image: latents.npy, label: labels.npy}"
        )
    if eval_fields is not None and (not isinstance(eval_fields, dict) or set(eval_fields) != set(fields)):
        raise ConfigError(f"data.eval_fields: expected the fields of data.fields: {', '.join(fields)}")
    for key, numbers in (("shift", shift), ("scale", scale)):
        for name, number in numbers.items():
            if name not in fields:
                raise ConfigError(f"data.{key}.{name}: not a field; data.fields has {', '.join(fields)}")
            if not isinstance(number, int | float) or not np.isfinite(number):
                raise ConfigError(f"data.{key}.{name}: {number!r} is not a finite number")


def _check_alike(train: Arrays, evaluation: Arrays) -> None:
    for name, field in evaluation.fields.items():
        other = train.fields[name]
        if (field.shape, field.is_whole) != (other.shape, other.is_whole):
            have, expected = (
                f"{'integers' if each.is_whole else 'floats'} of shape {each.shape} in a row"
                for each in (field, other)
            )
            raise ConfigError(f"{field.origin}: {have}, expected {expected}, as {other.origin} has")


def _shared(train: Arrays, evaluation: Arrays) -> list[str]:
    """Return a warning for each field that has files of the evaluation split in the training split too."""
    return [
        f"{own.origin}: of {len(own.paths)} files, {len(files)} are in {train.fields[name].origin} too: {listed(files)}"
        for name, own in evaluation.fields.items()
        if (files := shared_files(train.fields[name].paths, own.paths))
    ]


def _repeated(data: Arrays) -> list[str]:
    """Return a warning for each field if all have files that are there twice; files of labels may be, beside others."""
    repeated = {field.origin: repeated_files(field.paths) for field in data.fields.values()}
    if not all(repeated.values()):
        return []
    return [
        f"{origin}: there more than once, so rows of them may be in both splits: {listed(files)}"
        for origin, files in repeated.items()
    ]


def _facts(train: Arrays, evaluation: Arrays, num_classes: int | None) -> dict[str, Any]:
    """Return `image_shape` and `num_classes` if the fields have them."""
    facts: dict[str, Any] = {}
    image, label = train.fields.get("image"), train.fields.get("label")
    if image is not None:
        if image.is_whole:
            raise ConfigError(
                "data.fields.image: integers, expected floats; for 8-bit pixels set data.shift.image=127.5 and"
                " data.scale.image=0.00784313725"
            )
        if len(image.shape) == 3:
            facts["image_shape"] = list(image.shape)
    if label is None:
        if num_classes is not None:
            raise ConfigError("data.num_classes: expected a field label in data.fields")
        return facts
    if not label.is_whole or label.shape:
        raise ConfigError(
            "data.fields.label: expected one integer in a row, without data.shift or data.scale, got"
            f" {label.row}"
        )
    largest = max(_largest_label(split.fields["label"]) for split in (train, evaluation))
    if num_classes is not None and largest >= num_classes:
        raise ConfigError(f"data.num_classes: {num_classes} is not above the largest label, {largest}")
    return facts | {"num_classes": num_classes or largest + 1}


def _largest_label(field: Field) -> int:
    labels = field.read(np.arange(len(field)))
    if labels.min() < 0:
        raise ConfigError(
            f"{field.origin}: row {int(labels.argmin())} is {int(labels.min())}, expected 0 or more"
        )
    return int(labels.max())
