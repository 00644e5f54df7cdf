"""A sweep over nothing but averages is one training run done many times: a bank of averages answers it at once."""

import dataclasses
from collections.abc import Sequence

from ema.config import EMAConfig
from launch.sweeps.backends.base import launcher, shown
from launch.sweeps.config import LaunchConfig
from launch.sweeps.expand import Planned
from trainer.config.averages import BANK_RULES
from trainer.config.schema import Config

FIELDS = [field.name for field in dataclasses.fields(EMAConfig)]


def one_run_instead(runs: Sequence[Planned], launch: LaunchConfig) -> str | None:
    """The command of the one run that has every average of the sweep; None if there is no such run.

    There is one if each run keeps one average and the runs differ in nothing else. Where only `ema.decay` differs it
    is a bank of decays, otherwise one of named averages.
    """
    if len(runs) < 2 or any(len(run.averages) != 1 for run in runs):
        return None
    if any(run.config.ema.batchnorm_batches != runs[0].config.ema.batchnorm_batches for run in runs):
        return None
    if any(_without_averages(run.config) != _without_averages(runs[0].config) for run in runs[1:]):
        return None
    groups = [run.config.ema for run in runs]
    if any(group in groups[:number] for number, group in enumerate(groups)):
        return None
    first = groups[0]
    differing = [
        name for name in FIELDS if any(getattr(group, name) != getattr(first, name) for group in groups)
    ]
    shared = set.intersection(*(set(run.overrides) for run in runs))
    common = [override for override in runs[0].overrides if override in shared]
    if differing == ["decay"] and first.type in BANK_RULES:
        chosen = any(_key(override) in ("ema", "ema.type") for override in common) or first.type != "constant"
        decays = ",".join(repr(group.decay) for group in groups)
        bank = [*([] if chosen else ["ema=bank"]), f"ema.decays=[{decays}]"]
    else:
        names = [_word(next(iter(run.averages)), run.config.ema.type) for run in runs]
        names = [name if names.count(name) == 1 else f"{name}_{number}" for number, name in enumerate(names)]
        named = (f"{name}:{{{_fields(group, differing)}}}" for name, group in zip(names, groups, strict=True))
        bank = ["ema.decays=[]", f"ema.averages={{{','.join(named)}}}"]
    return shown([*launcher(launch), "-m", "trainer", *common, *bank])


def _without_averages(config: Config) -> Config:
    """The run without what its average is: the same for runs that train the same weights."""
    neutral = {name: getattr(EMAConfig(), name) for name in FIELDS}
    group = dataclasses.replace(config.ema, **neutral, decays=[], averages=None)
    return dataclasses.replace(config, ema=group)


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def _word(name: str, kind: str) -> str:
    """A key that YAML does not take for a number."""
    return name if name[0].isalpha() else f"{kind}_{name}"


def _fields(ema: EMAConfig, names: Sequence[str]) -> str:
    return ",".join(f"{name}:{_value(getattr(ema, name))}" for name in names)


def _value(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
