"""What a `.wandb` file holds, by wandb's own protocol buffers: a reader in Python it has no more since 0.31."""

import json
import struct
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32768, 7


def wandb_records(path: Path) -> list[Any]:
    """The records of the file: LevelDB's log format (blocks of 32 KiB; crc, length, type) after a 7-byte header.

    For a file that this very process wrote, wandb is torn down first: its writer is a process of its own, which may
    close the file after `finish` has returned.
    """
    import wandb
    from wandb.proto import wandb_internal_pb2 as protocol

    wandb.teardown()
    content, at, whole, records = path.read_bytes(), HEADER, b"", []
    while at + HEADER <= len(content):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        whole += content[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):  # a full record, or the last part of one
            records.append(protocol.Record.FromString(whole))
            whole = b""
    return records


def keyed(items: Any) -> dict[str, Any]:
    """Values of a history or summary by key; those of pictures and tables by `key.part`."""
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


class WandbRun:
    """What one session of a run told wandb."""

    def __init__(self, folder: Path) -> None:
        """Read the file in `wandb/offline-run-…`."""
        (file,) = folder.glob("*.wandb")
        self.folder = folder
        records = wandb_records(file)
        (self.run,) = (record.run for record in records if record.HasField("run"))
        self.config = {item.key: json.loads(item.value_json) for item in self.run.config.update if item.key}
        self.history = [keyed(record.history.item) for record in records if record.HasField("history")]
        self.summary: dict[str, Any] = {}
        for record in records:
            self.summary |= keyed(record.summary.update)
        self.exit_codes = [record.exit.exit_code for record in records if record.HasField("exit")]

    def scalars(self) -> list[dict[str, float]]:
        """The rows of the history without wandb's own columns, and without pictures and tables."""
        rows = [
            {key: value for key, value in row.items() if not key.startswith("_")}
            for row in self.history
            if not any(key.endswith("._type") for key in row)
        ]
        return [dict(sorted(row.items())) for row in rows]

    def media(self) -> dict[str, tuple[str, int, Path]]:
        """Type, step and file of each picture and table."""
        return {
            key.removesuffix("._type"): (
                kind,
                row["train/step"],
                self.folder / "files" / row[f"{key.removesuffix('._type')}.path"],
            )
            for row in self.history
            for key, kind in row.items()
            if key.endswith("._type")
        }
