"""Describe the status of a run as text, from its records, for the display of a run and for `launch.status`."""

import math
from dataclasses import dataclass, field

from trainer.report.format import display_name, format_difference, format_value
from trainer.report.statistics import Estimate
from trainer.rundir.keys import (
    EVALUATION,
    LIVE,
    average_key,
    average_of,
    evaluation_key,
    gap_error_key,
    gap_key,
)


@dataclass
class RunStatus:
    """Newest logged values of a run, and texts about them; needs neither torch nor a clock nor a terminal."""

    total: int
    """Number of steps of the whole run."""
    metric: str = "loss"
    """Evaluation metric to show."""
    higher_is_better: bool | None = False
    """Whether higher values of the metric are better; None if no average is the best."""
    step: int = 0
    """Last step with a record."""
    latest: dict[str, float] = field(default_factory=dict)
    """Newest value of each key that training steps log."""
    evaluation: dict[str, float] = field(default_factory=dict)
    """Values of the last evaluation."""
    plus_minus: str = "±"
    """Sign in front of a standard error; another one for terminals without Unicode."""

    def update(self, step: int, record: dict[str, float]) -> None:
        """Store the values of a record: those of its training step, and those of its evaluation if there was one."""
        self.step = step
        self.latest |= {key: number for key, number in record.items() if not key.startswith(EVALUATION)}
        evaluation = {key: number for key, number in record.items() if key.startswith(EVALUATION)}
        self.evaluation = evaluation or self.evaluation

    def training(self, record: dict[str, float] | None = None) -> list[str]:
        """Return texts of loss, learning rate, skipped steps and throughput, from a record or the newest values."""
        record = self.latest if record is None else record
        shown = []
        if "train/loss" in record:
            shown.append(f"loss {format_value(record['train/loss'])}")
        if "train/lr" in record:
            shown.append(f"lr {record['train/lr']:.3g}")
        if record.get("train/skipped_steps"):
            shown.append(f"skipped {record['train/skipped_steps']:.0f}")
        if "throughput/samples_per_s" in record:
            shown.append(f"{record['throughput/samples_per_s']:,.0f} samples/s")
        return shown

    def evaluated(self, record: dict[str, float] | None = None) -> list[str]:
        """Return texts of the live weights, the best average and its gap, from a record or from the last evaluation."""
        record = self.evaluation if record is None else record
        shown = []
        live = record.get(evaluation_key(LIVE, self.metric))
        if live is not None:
            shown.append(f"eval live {format_value(live)}")
        name = self._best(record)
        if name is not None:
            shown.append(
                f"best {display_name(name)} {format_value(record[evaluation_key(name, self.metric)])}"
            )
            gap, error = (record.get(key(name, self.metric)) for key in (gap_key, gap_error_key))
            if gap is not None:
                estimate = Estimate(gap, math.nan if error is None else error, math.inf)
                shown.append(f"gap {format_difference(estimate, self.plus_minus, ' SE')}")
        return shown

    def divergence(self) -> list[str]:
        """Return a text of the distance between the best average and the live weights; empty if it was not logged."""
        name = self._best(self.evaluation)
        key = average_key(str(name), "rel_l2")
        return [f"rel_l2 {self.latest[key]:.2e}"] if key in self.latest else []

    def time_left(self, seconds_per_step: float) -> str:
        """Return the remaining time as `h:mm:ss` for a mean time per step."""
        seconds = round(seconds_per_step * max(0, self.total - self.step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"

    def _best(self, record: dict[str, float]) -> str | None:
        """Return the name of the average with the best value; None if none is, or without values."""
        if self.higher_is_better is None:
            return None
        values = {
            name: number
            for key, number in record.items()
            if (name := average_of(key)) and key == evaluation_key(name, self.metric) and number == number
        }
        return (max if self.higher_is_better else min)(values, key=values.__getitem__) if values else None
