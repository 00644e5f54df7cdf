"""Map `.npy` files to memory. Python objects in them are never loaded."""

from typing import Any

import numpy as np
import numpy.typing as npt

NPY = b"\x93NUMPY"
"""First bytes of a `.npy` file."""


def is_npy(path: str) -> bool:
    """Return whether a file begins as numpy's `.npy` files do."""
    with open(path, "rb") as file:
        return file.read(len(NPY)) == NPY


def map_npy(path: str) -> npt.NDArray[Any]:
    """Map the array of a `.npy` file read-only.

    Raises:
        ValueError: The header is damaged, the file is shorter than its header promises, or it holds Python objects.
    """
    array: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return array
