"""The records of a run as a table for pandas; a stand-in gets the columns, so that pandas is not needed."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from trainer.errors import ConfigError
from trainer.report import frame as read_frame

RECORDS = """{"train/step": 1, "train/loss": 2.5}
{"train/step": 2, "train/loss": null, "eval/live/loss": 3}
{"train/step": 4, "eval/live/loss": 1.0}
"""


def test_a_frame_has_a_row_per_step_and_typed_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "metrics.jsonl").write_text(RECORDS)
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=dict))
    table = read_frame(str(tmp_path))
    assert list(table) == ["train/step", "train/loss", "eval/live/loss"]
    assert [column.dtype for column in table.values()] == [np.int64, np.float64, np.float64]
    assert table["train/step"].tolist() == [1, 2, 4]
    np.testing.assert_array_equal(table["train/loss"], [2.5, np.nan, np.nan])
    np.testing.assert_array_equal(table["eval/live/loss"], [np.nan, 3.0, 1.0])


def test_without_pandas_the_error_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metrics.jsonl").write_text(RECORDS)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ConfigError, match="expected the package pandas"):
        read_frame(tmp_path)
