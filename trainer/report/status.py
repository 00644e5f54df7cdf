"""The status of a run as text, from its records: for the display of a running one and for `launch.status`."""

import math
from dataclasses import dataclass, field

from trainer.report.format import display_name, format_value
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
    """The newest of every value that was logged. No torch, no clock, no terminal."""

    total: int
    """Steps of the whole run."""
    metric: str = "loss"
    """Evaluation metric to show."""
    higher_is_better: bool = False
    """Whether a higher value of the metric is better."""
    step: int = 0
    latest: dict[str, float] = field(default_factory=dict)
    """Values of training steps."""
    evaluation: dict[str, float] = field(default_factory=dict)
    """Values of the last evaluation."""
    plus_minus: str = "±"

    def update(self, step: int, record: dict[str, float]) -> None:
        """Take note of a logged record: the values of its training step, and of its evaluation if it had one."""
        self.step = step
        self.latest |= {key: number for key, number in record.items() if not key.startswith(EVALUATION)}
        evaluation = {key: number for key, number in record.items() if key.startswith(EVALUATION)}
        self.evaluation = evaluation or self.evaluation

    def training(self, record: dict[str, float] | None = None) -> list[str]:
        """Loss, learning rate, skipped steps and throughput: of this record, or the newest of each."""
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
        """Live and the best average of one evaluation, this record's or the newest, with the gap and its error."""
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
                known = error is not None and math.isfinite(error)  # one sample has no standard error
                rounded = round(gap, 4) + 0.0  # no -0.0000
                shown.append(f"gap {rounded:+.4f}" + (f" {self.plus_minus} {error:.4f} SE" if known else ""))
        return shown

    def divergence(self) -> list[str]:
        """How far the average that is best now is from the live weights."""
        name = self._best(self.evaluation)
        key = average_key(str(name), "rel_l2")
        return [f"rel_l2 {self.latest[key]:.2e}"] if key in self.latest else []

    def time_left(self, seconds_per_step: float) -> str:
        """Hours, minutes and seconds at this pace."""
        seconds = round(seconds_per_step * max(0, self.total - self.step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"

    def _best(self, record: dict[str, float]) -> str | None:
        """Name of the best average; NaN never is."""
        found = {
            name: number
            for key, number in record.items()
            if (name := average_of(key)) and key == evaluation_key(name, self.metric) and number == number
        }
        return (max if self.higher_is_better else min)(found, key=found.__getitem__) if found else None
