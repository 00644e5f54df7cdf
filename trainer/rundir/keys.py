"""Names of the metrics in `metrics.jsonl`: one place for the code that writes and the code that reads them."""

from collections.abc import Iterable

STEP = "train/step"
LIVE = "live"
"""Name of the live weights beside those of the averages."""
BEST = "best"
"""Word of command lines for the best weights (`weights=`) and for the step of the best evaluation (`step=`)."""
EVALUATION = "eval/"
"""Prefix of all metrics of an evaluation."""
GAP = "eval/gap/"
"""Prefix of the gaps and their standard errors."""
FURTHER_SAMPLES = "eval/further/samples"
"""Key of the number of further samples of the last evaluation (`trainer.eval_samples=auto`)."""
RACE = "eval/race/"
"""Prefix of what a race of the averages records."""
AVERAGE = "ema/"
"""Prefix of the metrics of an average between evaluations, and of its name on command lines."""
EVALUATED_AVERAGE = "eval/ema/"
AXIS = "axis/"
"""Prefix of the metrics of the best decay between the tracked ones (`ema.axis`)."""
SLOPE = "ema/slope"
"""Growth of the divergence with the horizon, over all averages (`ema.drift_slope`)."""


def evaluation_key(weights: str, metric: str) -> str:
    """Return the key of a metric of the live weights (`live`) or of an average."""
    return f"{EVALUATION}{LIVE}/{metric}" if weights == LIVE else f"{EVALUATED_AVERAGE}{weights}/{metric}"


def gap_key(average: str, metric: str) -> str:
    """Return the key of the paired gap, live minus average."""
    return f"{GAP}{average}/{metric}"


def gap_error_key(average: str, metric: str) -> str:
    """Return the key of the standard error of the paired gap."""
    return f"{gap_key(average, metric)}_se"


def raced_samples_key(average: str) -> str:
    """Return the key of the number of samples on which a race evaluated an average.

    An average with fewer samples than the evaluation was eliminated, and has no `eval/ema/...` in that record.
    """
    return f"{RACE}{average}/samples"


def raced(keys: Iterable[str]) -> list[str]:
    """Return the averages whose numbers of samples in a race are among the keys."""
    return [key.removeprefix(RACE).removesuffix("/samples") for key in keys if key.startswith(RACE)]


def average_key(average: str, quantity: str) -> str:
    """Return the key of a quantity of an average: `decay`, `rel_l2`, `cosine`, `block/<block>/rel_l2`."""
    return f"{AVERAGE}{average}/{quantity}"


def axis_key(quantity: str) -> str:
    """Return the key of a quantity of the best decay: `horizon`, `decay`, `predicted_error`, or the primary metric."""
    return f"{AXIS}{quantity}"


def metric_of(key: str) -> str | None:
    """Return the metric of a value of live weights or an average, with its evaluation set; None for other keys."""
    if key.startswith(EVALUATED_AVERAGE):
        return key.removeprefix(EVALUATED_AVERAGE).partition("/")[2]
    live = evaluation_key(LIVE, "")
    return key.removeprefix(live) if key.startswith(live) else None


def average_of(key: str) -> str | None:
    """Return the average that a key of an evaluation or of a divergence belongs to; None for other keys."""
    if key.startswith(EVALUATED_AVERAGE):
        return key.removeprefix(EVALUATED_AVERAGE).partition("/")[0]
    if key.startswith(AVERAGE) and key.endswith("/rel_l2") and "/block/" not in key:
        return key.removeprefix(AVERAGE).removesuffix("/rel_l2")
    return None
