"""Open the files of the library `datasets` memory-mapped: folders of `save_to_disk`, Arrow files, Parquet files.

Nothing of a folder is run or looked up: its JSON files only give names of files and of splits, which must be in it.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.data.matching import matching_files
from trainer.errors import ConfigError, blamed_on, listed
from trainer.rundir.files import read_json

if TYPE_CHECKING:
    from datasets import Dataset

TRAIN = "train"
"""Split that is trained on by default; folders and files without splits need no other."""
_SPLITS, _STATE = "dataset_dict.json", "state.json"
_PARQUET, _ARROW_FILE = b"PAR1", b"ARROW1"


@dataclass(frozen=True)
class Source:
    """Files of one split; what they have is read anew by each process that opens them."""

    files: tuple[str, ...]
    key: str
    """Config key of the path."""
    place: str
    """Folder, or first file, for messages."""
    are_parquet: bool

    def open(self) -> "Dataset":
        """Map the rows of all files, one file after the other.

        Parquet is compressed, so `datasets` first writes its rows to an Arrow file in its cache (`HF_DATASETS_CACHE`),
        once for all processes and runs.

        Raises:
            ConfigError: A file is damaged, or the files do not fit together.
        """
        import datasets

        with blamed_on(f"{self.key}: {self.place}"):
            if self.are_parquet:
                if not sys.stderr.isatty():
                    datasets.disable_progress_bars()
                # The library reads a path as a glob pattern.
                return datasets.Dataset.from_parquet([escape(os.path.abspath(file)) for file in self.files])
            return datasets.concatenate_datasets([_mapped(file, self.key) for file in self.files])


def find_source(path: str | Sequence[str], split: str | None, key: str, split_key: str) -> Source:
    """Find the files of one split.

    Args:
        path: folder of `save_to_disk`; or a path or glob pattern of Arrow or Parquet files, or a list of them.
        split: split of a folder that has several; other folders and files have none, but may be asked for `TRAIN`.
        key: config key of `path`, for messages.
        split_key: config key of `split`.

    Raises:
        ConfigError: The package `datasets` is missing, a file is missing or of another format, or a folder has no such
            split.
    """
    try:
        import datasets  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "data=hf: needs the package datasets: pip install -c constraints.txt -e '.[datasets]'"
        ) from error
    if isinstance(path, str) and os.path.isdir(path):
        folder = Path(path)
        if (folder / _SPLITS).is_file():
            folder = _folder_of_split(folder, split, key, split_key)
            return Source(_files_of(folder, key), key, str(folder), are_parquet=False)
        source = Source(_files_of(folder, key), key, str(folder), are_parquet=False)
    else:
        found = matching_files(path, key)
        kinds = [_is_parquet(file, key) for file in found]
        if len(set(kinds)) > 1:
            other = found[kinds.index(not kinds[0])]
            raise ConfigError(f"{key}: {other} is of another format than {found[0]}")
        source = Source(tuple(found), key, found[0], are_parquet=kinds[0])
    if split is not None and (split, split_key) != (TRAIN, "data.split"):
        raise ConfigError(f"{split_key}: {source.place} has no splits, expected a folder of a DatasetDict")
    return source


def _folder_of_split(folder: Path, split: str | None, key: str, split_key: str) -> Path:
    with blamed_on(f"{key}: {folder / _SPLITS}"):
        splits = [_plain_name(name) for name in read_json(folder / _SPLITS)["splits"]]
    if split not in splits:
        raise ConfigError(f"{split_key}: {split} is not a split of {folder}, expected {listed(splits)}")
    return folder / split


def _files_of(folder: Path, key: str) -> tuple[str, ...]:
    if not (folder / _STATE).is_file():
        raise ConfigError(
            f"{key}: {folder} has no {_STATE} of save_to_disk; name its files instead, such as"
            f" {folder / '*.parquet'}"
        )
    with blamed_on(f"{key}: {folder / _STATE}"):
        names = [_plain_name(file["filename"]) for file in read_json(folder / _STATE)["_data_files"]]
        if not names:
            raise ValueError("names no files")
        for name in names:
            if not (folder / name).is_file():
                raise ValueError(f"{name} is not a file")
    return tuple(str(folder / name) for name in names)


def _plain_name(name: Any) -> str:
    if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", ".."):
        raise ValueError(f"{name!r} is not the name of a file or folder in it")
    return name


def _is_parquet(path: str, key: str) -> bool:
    if not os.path.isfile(path):
        hint = "; a name on a hub is not loaded: download it first" if path.count("/") == 1 else ""
        raise ConfigError(f"{key}: {path} is not a file{hint}")
    with blamed_on(f"{key}: {path}"), open(path, "rb") as file:
        return file.read(len(_PARQUET)) == _PARQUET


def _mapped(path: str, key: str) -> "Dataset":
    import datasets
    import pyarrow

    with blamed_on(f"{key}: {path}"), open(path, "rb") as file:
        is_file_format = file.read(len(_ARROW_FILE)) == _ARROW_FILE
    with blamed_on(f"{key}: {path} cannot be read as an Arrow file"):
        if not is_file_format:
            return datasets.Dataset.from_file(path)
        table = pyarrow.ipc.open_file(pyarrow.memory_map(path)).read_all()
        # Without a fingerprint the library would read all rows to compute one.
        return datasets.Dataset(table, fingerprint=path)
