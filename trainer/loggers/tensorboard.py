"""Write TensorBoard event files under `run_dir/tensorboard`."""

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError
from trainer.protocols import Cell

Hook = Callable[[threading.ExceptHookArgs], object]


class TensorBoardLogger:
    """Logger that writes scalars, images and tables, and the run's configuration and summary as text."""

    def __init__(self, *, run_dir: Path, run_config: dict[str, Any], resumed_at: int | None) -> None:
        """Open an event file; for a resumed run, TensorBoard then hides the earlier events after step `resumed_at`.

        Raises:
            ConfigError: The package tensorboard is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "logger=tensorboard: the package tensorboard is missing;"
                " in the clone: pip install -c constraints.txt -e '.[tensorboard]'"
            ) from error
        self._last_step = resumed_at or 0
        purge = None if resumed_at is None else resumed_at + 1
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge)
        self._hook = threading.excepthook
        threading.excepthook = _leaving_writers_to_their_callers(self._hook)
        if resumed_at is None:
            self._text("config", run_config)

    def _text(self, tag: str, content: Mapping[str, Any]) -> None:
        # Markdown shows indented lines unchanged.
        text = json.dumps(content, indent=2, default=str).replace("\n", "\n    ")
        self._writer.add_text(tag, f"    {text}", self._last_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write each metric as a scalar at `step`."""
        self._last_step = step
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)

    def image(self, step: int, name: str, path: str) -> None:
        """Write a PNG file as an image at `step`."""
        import numpy as np
        from PIL import Image

        with Image.open(path) as picture:
            self._writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def table(self, step: int, name: str, headers: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Write a table as Markdown text."""
        lines = [headers, ["---"] * len(headers), *rows]
        text = "\n".join("| " + " | ".join(map(_cell_text, line)) + " |" for line in lines)
        self._writer.add_text(name, text, step)

    def close(self, summary: Mapping[str, float | str], exit_code: int) -> None:
        """Write the summary as text, and its numbers also as scalars under the same names; then close the file."""
        try:
            for key, value in summary.items():
                if not isinstance(value, str):
                    self._writer.add_scalar(key, value, self._last_step)
            self._text("summary", {**summary, "exit_code": exit_code})
            self._writer.close()
        finally:
            threading.excepthook = self._hook


def _leaving_writers_to_their_callers(hook: Hook) -> Hook:
    """Return a hook that prints errors of all threads but TensorBoard's writer, whose error the next call raises."""

    def print_other(args: threading.ExceptHookArgs) -> None:
        if not type(args.thread).__module__.startswith("tensorboard."):
            hook(args)

    return print_other


def _cell_text(cell: Cell) -> str:
    if cell is None or cell != cell:
        return ""
    return f"{cell:.6g}" if isinstance(cell, float) else str(cell)
