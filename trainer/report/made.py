"""The best decay that a run with `ema.axis` made between its averages, at its last evaluation."""

from dataclasses import dataclass

from trainer.report.best_decay import decay_text
from trainer.report.format import format_value
from trainer.report.runs import Run
from trainer.rundir.keys import LIVE, axis_key


@dataclass(frozen=True)
class Made:
    """An average that was made, evaluated and discarded."""

    horizon: float
    """In optimizer steps, `1 / (1 - decay)`."""
    value: float
    """Primary metric on the samples of the last evaluation."""
    step: int

    @property
    def decay(self) -> float:
        """Its decay per step."""
        return 1 - 1 / self.horizon


def best_made(run: Run) -> Made | None:
    """Return the best decay of the last evaluation; None without `ema.axis`, or if a tracked average has it."""
    horizons, values = (dict(run.series(axis_key(key)).pairs()) for key in ("horizon", run.primary_metric))
    last = int(max(run.evaluation(LIVE, run.primary_metric).steps, default=-1))
    horizon, value = horizons.get(last), values.get(last)
    if horizon is None or value is None or abs(round(horizon) - horizon) < 1e-6:
        return None
    return Made(horizon, value, last)


def made_notes(run: Run) -> list[str]:
    """Name the best decay that was made, with its value and the error of the making; [] without one."""
    made = best_made(run)
    if made is None:
        return []
    error = dict(run.series(axis_key("predicted_error")).pairs()).get(made.step)
    accuracy = "" if error is None else f", predicted error {error:.1g}"
    return [
        f"Best made decay {decay_text(made.horizon)}, horizon {made.horizon:.4g}: {run.primary_metric}"
        f" {format_value(made.value)} at step {made.step}{accuracy}."
    ]
