"""Read the records of a run as a pandas DataFrame; pandas is imported only here."""

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from trainer.errors import ConfigError
from trainer.report.runs import read_run
from trainer.rundir.keys import STEP


def frame(run_dir: str | Path) -> Any:
    """Return the records as a `pandas.DataFrame` with one row per logged step.

    Args:
        run_dir: A run directory.

    Returns:
        The int64 column `train/step`, rising, and one float64 column per key; NaN where a value was not logged or not
        finite.

    Raises:
        ConfigError: pandas is not installed, `run_dir` is not a run directory, or a record is damaged.
    """
    try:
        pandas = import_module("pandas")
    except ImportError as error:
        raise ConfigError("trainer.report.frame: expected the package pandas: pip install pandas") from error
    columns = {key: series for key, series in read_run(Path(run_dir)).columns.items() if key != STEP}
    logged = [series.steps for series in columns.values()]
    steps = np.unique(np.concatenate(logged)) if logged else np.empty(0, np.int64)
    data = {STEP: steps}
    for key, series in columns.items():
        data[key] = np.full(len(steps), np.nan)
        data[key][np.searchsorted(steps, series.steps)] = series.values
    return pandas.DataFrame(data)
