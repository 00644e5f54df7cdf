"""Read the tensors of any checkpoint part by part: files of safetensors and torch, and checkpoints of this project."""

import os
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from launch.merging.order import Snapshot
from trainer.checkpoint.format import INDEX, MARKER
from trainer.checkpoint.store import TensorReader, stored_progress, stored_tensors
from trainer.errors import ConfigError, message_of
from trainer.rundir.files import open_regular
from trainer.rundir.keys import AVERAGE, LIVE
from trainer.weights.opening import open_source
from trainer.weights.run_directory import MODEL, keys_by_name, started_counters
from trainer.weights.safetensors_files import SafetensorsFiles
from trainer.weights.selection import choose_one
from trainer.weights.source import Region
from trainer.weights.torch_files import TorchFiles


class Reader(ABC):
    """Tensors of one set of weights."""

    snapshot: Snapshot
    """Place of the checkpoint."""
    tensors: Mapping[str, Tensor]
    """A meta tensor of the shape and dtype of each tensor, by name."""
    aliases: Mapping[str, str]
    """Second names among `tensors`, each with the name under which the same tensor is stored."""
    files: Sequence[Path]
    """Files whose digests identify the weights."""
    in_parts: bool
    """Whether a part of a tensor is read without the rest."""

    @abstractmethod
    def read(self, name: str, region: Region) -> Tensor:
        """Return a part of a tensor, on the CPU.

        Raises:
            ConfigError: A file cannot be read or is damaged.
        """

    def note_files(self) -> None:
        """Note the state of the files, for `check_unchanged`."""
        self._noted = self._states()

    def check_unchanged(self) -> None:
        """Check that no file was written or replaced since `note_files`.

        Raises:
            ConfigError: A file was; what was read may be a mixture of two checkpoints.
        """
        if self._states() != self._noted:
            raise ConfigError(f"{self.snapshot.text} was changed while it was read")

    def _states(self) -> list[tuple[int, int, int]]:
        return [(found.st_ino, found.st_size, found.st_mtime_ns) for found in map(os.stat, self.files)]


class FileReader(Reader):
    """Tensors of a file or folder of safetensors or of `torch.save`."""

    in_parts = True

    def __init__(self, snapshot: Snapshot) -> None:
        source = open_source(snapshot.text)
        if not isinstance(source, SafetensorsFiles | TorchFiles):  # a run directory means its checkpoints
            raise ConfigError(f"{snapshot.text}: expected a file or folder of weights")
        if isinstance(source, TorchFiles):
            for file in source.files:
                _check_sums(file)
        self.snapshot, self._source = snapshot, source
        self.tensors, self.aliases, self.files = source.tensors, source.aliases, source.files

    def read(self, name: str, region: Region) -> Tensor:
        self.check_unchanged()
        return self._source.read(name, region)


class CheckpointReader(Reader):
    """Live weights or one average of a checkpoint of this project; DCP reads whole tensors."""

    in_parts = False

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        path = snapshot.path
        self._reader = TensorReader(path)
        stored, progress = stored_tensors(path), stored_progress(path)
        weights = choose_one(snapshot.name or LIVE, progress.averages)
        average = None if weights == LIVE else weights.removeprefix(AVERAGE)
        if average is not None:
            started_counters(self._reader.read, progress.step, average)
        names = [key.removeprefix(MODEL) for key in stored if key.startswith(MODEL)]
        if not names:
            raise ConfigError(
                f"{snapshot.text}: expected a checkpoint with a model; polyak posthoc combines snapshots of averages"
            )
        self._keys = {name: keys[0] for name, keys in keys_by_name(names, average, stored).items()}
        self.tensors = {name: stored[key] for name, key in self._keys.items()}
        self.aliases = {}
        self.files = [path / MARKER]

    def read(self, name: str, region: Region) -> Tensor:
        whole = self._reader.read(self._keys[name])
        return whole[region] if region else whole


def open_reader(snapshot: Snapshot) -> Reader:
    """Open a checkpoint; its tensors are not read yet.

    Raises:
        ConfigError: It cannot be read, is incomplete or damaged, or which weights are meant is unclear.
    """
    # A checkpoint of this project may be incomplete; its reader says so.
    ours = snapshot.path.is_dir() and any((snapshot.path / name).exists() for name in (MARKER, INDEX))
    reader: Reader = CheckpointReader(snapshot) if ours else FileReader(snapshot)
    reader.note_files()
    return reader


def _check_sums(file: Path) -> None:
    """Refuse a file of `torch.save` with a record that does not have its CRC-32, which torch does not check.

    Files of torch before 1.6 have no CRC-32.
    """
    damaged = None
    try:
        with open_regular(file) as opened:
            if zipfile.is_zipfile(opened):
                with zipfile.ZipFile(opened) as records:
                    damaged = records.testzip()
    except Exception as error:  # a damaged file may raise anything
        raise ConfigError(f"{file} cannot be read: {type(error).__name__}: {message_of(error)}") from error
    if damaged is not None:
        raise ConfigError(f"{file} is damaged: the record {damaged} does not have its checksum")
