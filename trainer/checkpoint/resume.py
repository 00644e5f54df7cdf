"""Continue a run from a checkpoint."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from ema.state import own_names
from trainer.build import Parts
from trainer.checkpoint.continuity import check_config, covered_by, refusal
from trainer.checkpoint.format import CheckpointError, CheckpointMisfit
from trainer.checkpoint.store import stored_progress, stored_scalars, stored_tensors
from trainer.checkpoint.training_state import LOSS_SCALE, load_training_state
from trainer.config.averages import grown_averages
from trainer.config.compose import to_config
from trainer.config.frozen import thaw
from trainer.config.schema import Config
from trainer.config.trust import leaves
from trainer.distributed.processes import agreeing
from trainer.errors import ConfigError
from trainer.rundir.continuing import Covered
from trainer.rundir.directory import RunDir

NOTHING = "nothing"
"""Text in messages for the value of a key that is not set."""


@dataclass(frozen=True)
class Start:
    """The point from which a session starts."""

    step: int = 0
    """Optimizer steps done."""
    samples: int = 0
    """Training samples that these steps used."""
    skipped: int = 0
    """Steps not taken because they were not finite."""
    notes: Sequence[str] = ()
    """Messages about averages that only the run or only the checkpoint has, a learning rate that jumps, a new seed."""
    covered: Mapping[str, Covered] = field(default_factory=dict)
    """What the checkpoint covers of the files of records, by name; empty without a checkpoint of this run."""
    forked: bool = False
    """Whether the checkpoint is that of another run, from which a new run begins."""


def continue_from(
    checkpoint: Path, parts: Parts, config: Config, run_dir: RunDir, *, key: str = "resume"
) -> Start:
    """Load a checkpoint into the parts of a run, as `restore` does, with errors that name the keys to change.

    Args:
        checkpoint: committed checkpoint in `run_dir`.
        parts: parts of the run, before any step.
        config: configuration of this session.
        run_dir: run directory, which records the configuration of the previous session.
        key: `resume`, or `fork` if the directory is that of another run, from which a new one begins.

    Raises:
        ConfigError: The checkpoint does not fit changed keys, or a file is damaged or cannot be read; names them.

    Collectives: an object all-gather and those of DCP.
    """
    before = to_config(thaw(run_dir.latest_config()))
    try:
        with agreeing("comparing the configuration with the checkpoint's", Exception):
            check_config(run_dir, checkpoint)
        start = restore(parts, checkpoint, config, before.trainer.global_batch_size)
        if before.seed != config.seed:
            start = replace(start, notes=[*start.notes, _other_seed(start.step, before.seed, config.seed)])
        return start if key == "resume" else replace(start, covered={}, forked=True)
    except CheckpointMisfit as error:
        changed, what = _changed_keys(before, config, error)
        if not changed:
            raise ConfigError(f"{key}: {error}") from error
        raise ConfigError(f"{changed}: the checkpoint does not fit the changed {what} ({error})") from error
    except CheckpointError as error:
        if key != "resume":
            raise ConfigError(f"{key}: {error}") from error
        raise refusal(error, checkpoint) from error


def _changed_keys(before: Config, now: Config, misfit: CheckpointMisfit) -> tuple[str, str]:
    """Return a text about the changed keys that may explain a misfit ("" if none), and their part.

    The tensors of the model are compared first. So if a tensor of an average or of the optimizer does not fit, the keys
    of the model are not the cause.
    """
    kind, _, rest = misfit.tensor.partition("/")
    if kind == "ema" and misfit.is_dtype:
        name = rest.partition("/")[0]
        (_, old), (key, new) = _dtype_of(before, name), _dtype_of(now, name)
        return (f"{key}: expected {old}, got {new}" if old != new else ""), "average"
    if kind != "model" or misfit.is_dtype:
        return "", "model"
    was, now_is = dict(leaves("model", before.model)), dict(leaves("model", now.model))
    values = ((key, was.get(key, NOTHING), now_is.get(key, NOTHING)) for key in {**was, **now_is})
    return "; ".join(f"{key}: expected {old}, got {new}" for key, old, new in values if old != new), "model"


def _dtype_of(config: Config, average: str) -> tuple[str, str | None]:
    """Return the key that sets the dtype of an average, and its value."""
    own = (config.ema.averages or {}).get(average)
    if isinstance(own, Mapping) and "dtype" in own:
        return f"ema.averages.{average}.dtype", own["dtype"]
    return "ema.dtype", config.ema.dtype


def restore(parts: Parts, checkpoint: Path, config: Config, batch_size: int) -> Start:
    """Load a checkpoint into the parts of a run, which has done no step yet.

    An average that is not in the checkpoint starts from the loaded weights. An average that the run no longer keeps is
    ignored. The bank gets those that the run had added to it (`ema.axis_grows`). The checkpoints of earlier versions do
    not count their samples; `batch_size` is that of the session that wrote the checkpoint.

    Raises:
        CheckpointError: A file is damaged, or a tensor is missing or has a wrong shape; names it.
        ConfigError: `trainer.steps` is less than the steps done already.

    Collectives: those of DCP, and of making the averages that the run had added.
    """
    with agreeing("reading the checkpoint's step", Exception):
        progress, covered = stored_progress(checkpoint), covered_by(checkpoint)
        # A run that has computed in another dtype so far has no scale.
        scaled = LOSS_SCALE in stored_scalars(checkpoint)
    bank, stored = parts.bank, progress.averages
    for name, own in takewhile(lambda item: item[0] in stored, grown_averages(config).items()):
        bank.add(parts.network.module, name, own)
    averages = {
        name: _stored_keys(f"ema/{name}/", average.state_dict(), checkpoint)
        for name, average in bank.items()
        if name in stored
    }
    others: dict[str, Any] = {"ema": averages}
    if parts.loss_scale is not None and scaled:
        others[LOSS_SCALE] = parts.loss_scale.state()
    loaded = load_training_state(checkpoint, parts.network.module, parts.optimizer, others)
    if parts.loss_scale is not None and not parts.loss_scale.is_usable():
        values = {name: value.item() for name, value in parts.loss_scale.state().items()}
        wanted = f"{LOSS_SCALE}: expected a positive, finite scale and a growth of at least 0"
        raise CheckpointMisfit(f"{checkpoint}: {wanted}, got {values}", LOSS_SCALE)
    for name in averages:
        bank[name].load_state_dict(loaded["ema"][name])
    step, steps = progress.step, config.trainer.steps
    if step > steps:
        raise ConfigError(f"trainer.steps: expected at least the {step} steps done, got {steps}")
    notes = _other_averages(bank, stored)
    if progress.lr is not None and step < steps:
        notes += _jump_of_the_lr(step, progress.lr, config.optimizer.lr * parts.lr_factor(step))
    samples = step * batch_size if progress.samples is None else progress.samples
    return Start(step, samples, progress.skipped, notes, covered)


def _other_averages(bank: Collection[str], stored: Collection[str]) -> list[str]:
    """Return notes on the averages that only the run or only the checkpoint has."""
    new = [name for name in bank if name not in stored]
    # With ema=off the user wants no averages. A run that keeps others may have dropped these by mistake.
    gone = [name for name in stored if name not in bank] if bank else []
    return [
        *(f"ema/{name} is not in the checkpoint: it starts from the loaded weights" for name in new),
        *(f"warning: ema/{name} of the checkpoint is not kept by this run any more" for name in gone),
    ]


def _jump_of_the_lr(step: int, before: float, now: float) -> list[str]:
    """Return a warning if the schedule gives a step that is done another learning rate than it had."""
    if math.isclose(before, now, rel_tol=1e-6):
        return []
    return [
        f"warning: the learning rate jumps: step {step} had {before:.3g}, and now the schedule gives it {now:.3g}"
        " (trainer.steps, schedule and optimizer.lr decide it)"
    ]


def _other_seed(step: int, before: int, now: int) -> str:
    return f"seed was {before} and is {now}: after step {step} the order of samples and all random numbers are others"


def _stored_keys(prefix: str, state: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """Return the state of an average by the keys of the checkpoint.

    Earlier versions saved averages without the name of a submodule called `module`.
    """
    keys = [key.removeprefix(prefix) for key in stored_tensors(checkpoint) if key.startswith(prefix)]
    if state.keys() <= set(keys):
        return state
    stored = {name: key for key, name in own_names(keys, state.keys()).items()}
    return {stored.get(name, name): tensor for name, tensor in state.items()}
