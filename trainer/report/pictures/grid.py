"""Image grid of the samples that the live weights and each average make from the same random numbers."""

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from trainer.rundir.files import write_atomically

PANELS_PER_ROW = 4
MIN_IMAGE_PX = 32
MARGIN_PX = 12
TITLE_PX = 22


def write_grid(path: Path, images: Mapping[str, NDArray[Any]], columns: int | None = None) -> None:
    """Write images as one PNG with titled panels side by side.

    A sample has the same position in every panel. Small images are enlarged without smoothing.

    Args:
        path: PNG file, written atomically.
        images: `[n, c, h, w]` in [0, 1], c = 1 or 3, of the same shape for each panel, by its title; values outside are
            clipped.
        columns: number of panels in a row; None chooses one.

    Raises:
        ValueError: The images of the first panel are not `[n, c, h, w]` with c = 1 or 3, or others have another shape.
    """
    (first, its), *_ = images.items()
    if its.ndim != 4 or its.shape[0] == 0 or its.shape[1] not in (1, 3):
        raise ValueError(f"write_grid: {first} has shape {its.shape}, expected [n, 1 or 3, h, w]")
    for title, own in images.items():
        if own.shape != its.shape:
            raise ValueError(f"write_grid: {title} has shape {own.shape}, {first} has {its.shape}")
    panels = {title: _panel(own) for title, own in images.items()}
    if columns is None:
        columns = math.ceil(len(panels) / math.ceil(len(panels) / PANELS_PER_ROW))
    rows = math.ceil(len(panels) / columns)
    font = ImageFont.load_default(size=15)
    width = max(
        [panel.width for panel in panels.values()] + [math.ceil(font.getlength(title)) for title in panels]
    )
    cell_w, cell_h = width + MARGIN_PX, next(iter(panels.values())).height + TITLE_PX + MARGIN_PX
    sheet = Image.new("RGB", (columns * cell_w + MARGIN_PX, rows * cell_h), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (title, panel) in enumerate(panels.items()):
        x, y = index % columns * cell_w + MARGIN_PX, index // columns * cell_h
        draw.text((x + width / 2, y + TITLE_PX / 2), title, font=font, fill="black", anchor="mm")
        sheet.paste(panel, (x + (width - panel.width) // 2, y + TITLE_PX))
    content = io.BytesIO()
    sheet.save(content, format="PNG")
    write_atomically(path, content.getvalue())


def _panel(images: NDArray[Any]) -> Image.Image:
    """Arrange images in a near-square grid with gaps of 2 pixels."""
    count, _, height, width = images.shape
    scale = max(1, math.ceil(MIN_IMAGE_PX / min(height, width)))
    columns = math.ceil(math.sqrt(count))
    step_x, step_y = width * scale + 2, height * scale + 2
    panel = Image.new("RGB", (columns * step_x - 2, math.ceil(count / columns) * step_y - 2), "#808080")
    # NaN would be cast to an arbitrary byte; black makes it visible.
    pixels = (np.clip(np.nan_to_num(images.astype(np.float32)), 0, 1) * 255).round().astype(np.uint8)
    for index, chw in enumerate(pixels):
        hwc = np.broadcast_to(np.moveaxis(chw, 0, -1), (height, width, 3))
        tile = Image.fromarray(np.ascontiguousarray(hwc)).resize(
            (width * scale, height * scale), Image.Resampling.NEAREST
        )
        panel.paste(tile, (index % columns * step_x, index // columns * step_y))
    return panel
