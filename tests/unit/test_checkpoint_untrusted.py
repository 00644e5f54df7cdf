"""Loading a checkpoint runs no code of it, whatever was planted where; its author can make the checksums fit.

Each payload creates a file when it is unpickled; the first test shows that torch's own reader does run it.
"""

import io
import json
import os
import pickle
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from tests.makers import save_checkpoint
from trainer.checkpoint.store import load_checkpoint, stored_tensors
from trainer.errors import ConfigError


class Payload:
    """Creates `path` when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "checkpoints", 1, {"w": torch.ones(4), "b": torch.ones(2)}, keep=1)


def plant(checkpoint: Path, name: str, data: bytes) -> None:
    """Replace a file and make the marker agree with it."""
    (checkpoint / name).write_bytes(data)
    marker = json.loads((checkpoint / "COMMIT.json").read_text())
    marker["files"][name] = {"bytes": len(data), "crc32": zlib.crc32(data)}
    (checkpoint / "COMMIT.json").write_text(json.dumps(marker))


def index_of(checkpoint: Path) -> Any:
    return pickle.loads((checkpoint / ".metadata").read_bytes())


def assert_refused(checkpoint: Path, message: str) -> None:
    target = torch.zeros(4)
    with pytest.raises(ConfigError, match=rf"^{checkpoint}.*{message}") as caught:
        load_checkpoint(checkpoint, {"w": target})
    assert "\n" not in str(caught.value)
    assert not target.any()


def test_payload_runs_where_the_index_is_simply_unpickled(checkpoint: Path, tmp_path: Path) -> None:
    plant(checkpoint, ".metadata", pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(BaseException):  # noqa: B017  what follows the payload does not matter
        dcp.load({"w": torch.zeros(4)}, checkpoint_id=checkpoint, no_dist=True)
    assert (tmp_path / "ran").exists()


def test_payload_as_the_index_does_not_run(checkpoint: Path, tmp_path: Path) -> None:
    plant(checkpoint, ".metadata", pickle.dumps(Payload(tmp_path / "ran")))
    assert_refused(checkpoint, r"/\.metadata cannot be read \(posix\.mkdir")
    with pytest.raises(ConfigError, match=r"posix\.mkdir"):
        stored_tensors(checkpoint)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_payload_inside_a_true_index_does_not_run(checkpoint: Path, tmp_path: Path, protocol: int) -> None:
    index = index_of(checkpoint)
    index.planner_data = {"w": Payload(tmp_path / "ran")}
    plant(checkpoint, ".metadata", pickle.dumps(index, protocol=protocol))
    assert_refused(checkpoint, r"/\.metadata cannot be read")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name", ["builtins eval", "torch load", "torch.serialization load", "torch.hub load", "os system"]
)
def test_callables_are_unknown_to_the_index(checkpoint: Path, name: str) -> None:
    words = b"".join(b"\x8c" + bytes([len(word)]) + word.encode() for word in name.split())
    plant(checkpoint, ".metadata", b"\x80\x04" + words + b"\x93.")
    assert_refused(checkpoint, r"\.metadata cannot be read \(" + name.replace(" ", r"\."))


def test_entry_of_pickled_objects_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    payload = io.BytesIO()
    torch.save(Payload(tmp_path / "ran"), payload)
    plant(checkpoint, "__0_0.distcp", payload.getvalue())
    index = index_of(checkpoint)
    info = index.storage_data[MetadataIndex("w", (0,))]
    info.offset, info.length = 0, len(payload.getvalue())
    index.state_dict_metadata["w"] = BytesStorageMetadata()
    index.storage_data[MetadataIndex("w")] = info
    plant(checkpoint, ".metadata", pickle.dumps(index))
    assert_refused(checkpoint, r"/\.metadata lists pickled objects")
    assert not (tmp_path / "ran").exists()


def test_payload_in_the_place_of_a_tensor_does_not_run(checkpoint: Path, tmp_path: Path) -> None:
    payload = io.BytesIO()
    torch.save(Payload(tmp_path / "ran"), payload)
    plant(checkpoint, "__0_0.distcp", payload.getvalue())
    index = index_of(checkpoint)
    for info in index.storage_data.values():
        info.offset, info.length = 0, len(payload.getvalue())
    plant(checkpoint, ".metadata", pickle.dumps(index))
    assert_refused(checkpoint, "cannot be read: UnpicklingError")
    assert not (tmp_path / "ran").exists()


def test_index_may_not_point_outside_the_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    torch.save(torch.full((4,), 7.0), tmp_path / "secret")
    index = index_of(checkpoint)
    info = index.storage_data[MetadataIndex("w", (0,))]
    info.relative_path, info.offset, info.length = "../../secret", 0, (tmp_path / "secret").stat().st_size
    plant(checkpoint, ".metadata", pickle.dumps(index))
    assert_refused(checkpoint, r"/\.metadata names a file that COMMIT\.json does not list")
    marker = json.loads((checkpoint / "COMMIT.json").read_text())
    marker["files"]["../../secret"] = {"bytes": info.length, "crc32": 0}
    (checkpoint / "COMMIT.json").write_text(json.dumps(marker))
    assert_refused(checkpoint, r"/COMMIT\.json lists \.\./\.\./secret")


def test_index_must_cover_the_whole_tensor(checkpoint: Path) -> None:
    index = index_of(checkpoint)
    index.state_dict_metadata["w"].chunks = []
    plant(checkpoint, ".metadata", pickle.dumps(index))
    assert_refused(checkpoint, r"the chunks of w")


HIDDEN_BY_A_FRAME = (
    b"\x95"
    + (2).to_bytes(8, "little")
    + b"J\0"
    + bytes(3)
    + b"Cr"
    + (1 << 26).to_bytes(4, "little")
    + b"."
    + bytes(109)
)
"""Python's unpickler reads the number of `J` from behind the frame, and then LONG_BINPUT."""


@pytest.mark.parametrize(
    ("opcodes", "reason"),
    [
        (b"Nr\0\0\0\x10", "the opcode 'r' is not allowed"),
        (b"Nq\x05", "the opcode 'q' is not allowed"),
        (b"Np99999999\n", "the opcode 'p' is not allowed"),
        (b"\x8e\x01" + bytes(7) + b"xr\0\0\0\x10", "the opcode 'r' is not allowed"),
        (b"cos\nsystem\n", "the opcode 'c' is not allowed"),
        (HIDDEN_BY_A_FRAME, "the opcode 'J' crosses the end of a frame"),
        (b"\x95" + (20).to_bytes(8, "little") + b"\x95" + bytes(8), r"the opcode '\\x95' is not allowed"),
        (b"\x8d" + b"\xff" * 8, "it is cut off"),
    ],
)
def test_an_index_of_other_opcodes_takes_no_memory(checkpoint: Path, opcodes: bytes, reason: str) -> None:
    plant(checkpoint, ".metadata", b"\x80\x04" + opcodes + b".")
    assert_refused(checkpoint, rf"/\.metadata cannot be read \({reason}")


def split(checkpoint: Path, *places: tuple[int, int]) -> None:
    """Make the index list the tensor w of 4 elements as chunks (offset, size)."""
    index = index_of(checkpoint)
    (chunk,) = index.state_dict_metadata["w"].chunks
    (place,) = [place for place in index.storage_data if place.fqn == "w"]
    chunks = []
    for offset, size in places:
        chunks.append(type(chunk)(offsets=torch.Size([offset]), sizes=torch.Size([size])))
        index.storage_data[MetadataIndex("w", torch.Size([offset]), len(chunks))] = index.storage_data[place]
    index.state_dict_metadata["w"].chunks[:] = chunks
    plant(checkpoint, ".metadata", pickle.dumps(index))


@pytest.mark.parametrize(
    "places", [[(0, 2), (0, 2)], [(0, 2), (1, 3)], [(0, 2)], [(1, 3)], [(0, 4), (0, 4)], [(0, 3), (3, 2)]]
)
def test_chunks_that_leave_a_part_unread_are_refused(checkpoint: Path, places: list[tuple[int, int]]) -> None:
    split(checkpoint, *places)
    assert_refused(checkpoint, "the chunks of w")
