"""Parsed command line of `launch.posthoc`. No torch here: bad arguments are refused before it is imported."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ema.config import EMAConfig
from launch.cli import parse_count
from launch.exporting.files import Destination
from launch.merging.options import average_of
from trainer.errors import ConfigError

KEYS = (
    "decay",
    "sigma_rel",
    "halflife",
    "fraction",
    "profile",
    "window",
    "step",
    "basis",
    "export",
    "out",
    "cooldown",
)
"""Arguments that are no overrides of the configuration."""
RULES = {"decay": "decay", "halflife": "halflife", "sigma_rel": "power", "fraction": "fraction"}
"""Rule in `launch.merging.options.AVERAGES` by argument."""
PROFILES = ("minus_sqrt", "linear", "cosine", "uniform")
"""Decays of the learning rate that an average can replace (`ema.posthoc.DECAYS`)."""
BEST = "best"
"""Value of `decay=` that searches the horizon."""


@dataclass(frozen=True)
class Target:
    """An average to make."""

    name: str
    config: EMAConfig | None = None
    """Its rule; None for a profile."""
    profile: str = ""
    """Decay of the learning rate that the average replaces, or a file with the weights of the newest steps."""
    window: int = 0
    """Number of the newest steps that a decay weights; 0 for a rule or a file."""


@dataclass(frozen=True)
class Request:
    """Arguments of `launch.posthoc`."""

    run_dir: Path
    step: str | int
    """Checkpoint with the live weights: `last`, or a number of steps."""
    targets: list[Target]
    basis: tuple[str, ...]
    """Names and patterns of the stored weights to make them from."""
    search: bool
    """Whether the horizon of a constant decay is searched."""
    out: Path | None
    """File for the result; None chooses a new one in the run's `evaluations/`."""
    export: Destination | None
    """File of safetensors to make of the only average that was named, else of the chosen weights; None makes none."""
    cooldown: Path | None = None
    """Run directory of a fork with a decay of the learning rate, to compare with."""


def parse_targets(own: Mapping[str, str]) -> tuple[list[Target], bool]:
    """Return the averages that the arguments name, and whether the decay is searched; without any it is.

    Raises:
        ConfigError: A value is no setting of its rule, or a profile lacks its window.
    """
    targets: list[Target] = []
    search = not any(key in own for key in (*RULES, "profile"))
    for key, rule in RULES.items():
        for text in own[key].split(",") if key in own else ():
            if key == "decay" and text == BEST:
                search = True
            else:
                targets.append(Target(f"{key} {text}", average_of(rule, text, key)))
    windows = [parse_count("window", text) for text in own["window"].split(",")] if "window" in own else []
    names = own["profile"].split(",") if "profile" in own else []
    for name in names:
        targets += _profiles(name, windows)
    if windows and not any(name in PROFILES for name in names):
        raise ConfigError(f"window: read only with profile=, one of {', '.join(PROFILES)}")
    titles = [target.name for target in targets]
    for title in titles:
        if titles.count(title) > 1:
            raise ConfigError(f"{title}: expected each average once")
    return targets, search


def _profiles(name: str, windows: list[int]) -> list[Target]:
    if name in PROFILES:
        if not windows:
            raise ConfigError(f"window: expected with profile={name}, a number of the newest steps")
        return [Target(f"{name} {window}", profile=name, window=window) for window in windows]
    if Path(name).suffix in (".txt", ".npy"):
        return [Target(name, profile=name)]
    raise ConfigError(f"profile: expected {', '.join(PROFILES)}, or FILE.txt or FILE.npy, got {name[:300]}")
