"""Columns of Arrow tables as fields of a batch: numbers, lists of equal length, and pictures."""

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainer.data.decoding import read_rgb
from trainer.errors import ConfigError, blamed_on, listed

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset
    from PIL.Image import Image


@dataclass(frozen=True)
class Column:
    """One column of a data set, whose rows are alike.

    Args:
        name: name of the column.
        origin: config key and name of the column, for error messages.
        shape: shape of a row; empty for pictures.
        kind: `integers` (int64 in a batch), `floats` (float32) or `pictures`.
        largest: largest integer; 0 for other kinds.
        smallest: smallest integer, likewise.
        classes: names of the classes of a column of class labels; empty for others.
    """

    name: str
    origin: str
    shape: tuple[int, ...]
    kind: str
    largest: int = 0
    smallest: int = 0
    classes: tuple[str, ...] = ()

    def read(self, table: "pa.Table") -> Tensor:
        """Return the numbers of all rows of a table, int64 or float32 `[rows, *shape]`."""
        values, _ = _flat(table[self.name].combine_chunks(), self.origin, 0)
        dtype = np.int64 if self.kind == "integers" else np.float32
        with np.errstate(over="ignore"):
            numbers = np.array(values.to_numpy(zero_copy_only=False), dtype)
        return torch.from_numpy(numbers.reshape(len(table), *self.shape))

    def pictures(self, table: "pa.Table", rows: npt.NDArray[np.int64]) -> Iterator["Image"]:
        """Decode the pictures of a table, one after the other; `rows` are their numbers, for messages.

        Raises:
            ConfigError: A picture cannot be decoded.
        """
        for data, row in zip(_encoded(table[self.name].combine_chunks()), rows, strict=True):
            with blamed_on(f"{self.origin}: row {row} cannot be read as an image"):
                yield read_rgb(io.BytesIO(data.as_buffer()))


def find_column(dataset: "Dataset", name: str, key: str, place: str) -> Column:
    """Find what a column holds, and check that its rows are alike and none is missing.

    Lengths of lists are read for all rows, integers too; floats and pictures are not read.

    Args:
        dataset: rows.
        name: name of the column.
        key: config key of `name`, for messages.
        place: file or folder of the data set, for messages.

    Raises:
        ConfigError: There is no such column, its type is no number, list of numbers or picture, or its rows differ.
    """
    if name not in dataset.column_names:
        raise ConfigError(f"{key}: {place} has no column {name!r}, expected {listed(dataset.column_names)}")
    origin = f"{key}: column {name!r} of {place}"
    kind = _kind(dataset.data.table.schema.field(name).type, origin)
    shapes: list[tuple[int, ...]] = []
    extremes: list[int] = []
    start = 0
    for chunk in dataset.data.table[name].chunks:
        if not len(chunk):
            continue
        with blamed_on(origin):
            chunk.validate(full=True)  # offsets of a damaged file would be followed to anywhere in memory
        if kind == "pictures":
            for part in (chunk, _encoded(chunk)):
                _refuse_missing(part, origin, start, 1)
            shapes.append(())
        else:
            values, shape = _flat(chunk, origin, start)
            extremes += _extremes(values) if kind == "integers" else []
            shapes.append(shape)
        if shapes[-1] != shapes[0]:
            raise ConfigError(
                f"{origin} has shape {list(shapes[-1])} in row {start}, expected {list(shapes[0])} as in row 0;"
                " rows must have equal lengths"
            )
        start += len(chunk)
    if not shapes or 0 in shapes[0]:
        raise ConfigError(f"{origin} has no values")
    classes = tuple(getattr(dataset.features[name], "names", None) or ())
    largest, smallest = max(extremes, default=0), min(extremes, default=0)
    return Column(name, origin, shapes[0], kind, largest, smallest, classes)


def _kind(arrow_type: "pa.DataType", origin: str) -> str:
    """Return `pictures`, `integers` or `floats`, the kind of the values of a column."""
    from pyarrow import BaseExtensionType, types

    inner = arrow_type
    while True:
        if isinstance(inner, BaseExtensionType):
            inner = inner.storage_type
        elif types.is_list(inner) or types.is_large_list(inner) or types.is_fixed_size_list(inner):
            inner = inner.value_type
        else:
            break
    has_bytes = types.is_struct(arrow_type) and arrow_type.get_field_index("bytes") >= 0
    encoded = arrow_type.field("bytes").type if has_bytes else arrow_type
    if types.is_binary(encoded) or types.is_large_binary(encoded):
        return "pictures"
    if (types.is_integer(inner) and not types.is_uint64(inner)) or types.is_boolean(inner):
        return "integers"
    if types.is_floating(inner):
        return "floats"
    raise ConfigError(
        f"{origin} has {arrow_type}, expected numbers (up to int64 or float64), lists of them, or pictures"
    )


def _encoded(array: Any) -> Any:
    """Return the bytes of pictures, which `datasets` keeps in a structure with their paths."""
    import pyarrow

    return array.field("bytes") if pyarrow.types.is_struct(array.type) else array


def _flat(array: Any, origin: str, start: int) -> tuple[Any, tuple[int, ...]]:
    """Return the numbers of an Arrow array, also of lists of any depth, as a flat one, and the shape of a row.

    `start` is the number of the first row, for messages.

    Raises:
        ConfigError: A value is missing, or rows differ in length.
    """
    import pyarrow
    from pyarrow import compute, types

    shape: list[int] = []
    while True:
        if isinstance(array, pyarrow.ExtensionArray):
            array = array.storage
        _refuse_missing(array, origin, start, math.prod(shape))
        if types.is_fixed_size_list(array.type):
            shape.append(array.type.list_size)
        elif types.is_list(array.type) or types.is_large_list(array.type):
            lengths = compute.list_value_length(array).to_numpy(zero_copy_only=False)
            odd = np.flatnonzero(lengths != lengths[:1])
            if len(odd):
                row = start + int(odd[0]) // math.prod(shape)
                raise ConfigError(
                    f"{origin} has a list of {lengths[odd[0]]} values in row {row}, expected {lengths[0]} as in row"
                    f" {start}; rows must have equal lengths"
                )
            shape.append(int(lengths[0]) if len(lengths) else 0)
        else:
            return array, tuple(shape)
        array = array.flatten()


def _refuse_missing(array: Any, origin: str, start: int, values_per_row: int) -> None:
    if array.null_count:
        position = int(np.argmax(array.is_null().to_numpy(zero_copy_only=False)))
        raise ConfigError(f"{origin} has no value in row {start + position // max(1, values_per_row)}")


def _extremes(values: Any) -> list[int]:
    from pyarrow import compute, types

    if not len(values):
        return []
    if types.is_boolean(values.type):
        return [0, 1]
    both = compute.min_max(values).as_py()
    return [both["min"], both["max"]]
