"""A run carried on: its newest checkpoint loaded, or one line that says what does not fit and what to do."""

from collections.abc import Mapping
from pathlib import Path

from trainer.checkpoint.format import CheckpointError, CheckpointMisfit, DamagedCheckpoint, committed
from trainer.checkpoint.store import stored_scalars
from trainer.checkpoint.training_state import load_training_state
from trainer.config.compose import thaw, to_config
from trainer.config.schema import Config
from trainer.config.targets import leaves
from trainer.distributed.processes import agreeing
from trainer.errors import ConfigError
from trainer.loop import Run
from trainer.rundir.directory import RunDir

NOTHING = "nothing"
"""In place of the value of a key that is not set."""


def carry_on(config: Config, run_dir: RunDir, run: Run, checkpoint: Path) -> list[str]:
    """`restore`, for whoever typed `resume=`.

    Args:
        config: of this session.
        run_dir: the run's, which does not know of this session yet.
        run: that has not begun.
        checkpoint: in `run_dir`.

    Returns:
        As `restore`.

    Raises:
        ConfigError: naming the keys that were changed and do not fit, or the file that is damaged or cannot be read.

    Collectives: those of DCP.
    """
    try:
        return restore(run, checkpoint)
    except DamagedCheckpoint as error:
        older = [path.name for path in committed(checkpoint.parent) if path != checkpoint]
        advice = f"; remove {checkpoint.name} to go on from {older[-1]}" if older else ""
        raise ConfigError(f"resume: {error}{advice}") from error
    except CheckpointMisfit as error:
        told, what = _blame(to_config(thaw(run_dir.latest_config())), config, error)
        if not told:
            raise ConfigError(f"resume: {error}") from error
        raise ConfigError(f"{told}: the checkpoint does not fit the changed {what} ({error})") from error
    except CheckpointError as error:
        raise ConfigError(f"resume: {error}") from error


def _blame(before: Config, now: Config, misfit: CheckpointMisfit) -> tuple[str, str]:
    """The changed keys, with their values, that a tensor may not fit for, and what they set; empty if there are none.

    The model's tensors are looked at first, so an average's or the optimizer's that misfits has a cause of its own.
    """
    kind, _, rest = misfit.tensor.partition("/")
    if kind == "ema" and misfit.is_dtype:
        name = rest.partition("/")[0]
        (_, old), (key, new) = _dtype_of(before, name), _dtype_of(now, name)
        return (f"{key}: expected {old}, got {new}" if old != new else ""), "average"
    if kind != "model" or misfit.is_dtype:
        return "", "model"
    was, now_is = dict(leaves("model", before.model)), dict(leaves("model", now.model))
    changed = [key for key in {**was, **now_is} if was.get(key, NOTHING) != now_is.get(key, NOTHING)]
    told = (f"{key}: expected {was.get(key, NOTHING)}, got {now_is.get(key, NOTHING)}" for key in changed)
    return "; ".join(told), "model"


def _dtype_of(config: Config, average: str) -> tuple[str, str | None]:
    """The key that sets the dtype of an average, and its value."""
    own = (config.ema.averages or {}).get(average)
    if isinstance(own, Mapping) and "dtype" in own:
        return f"ema.averages.{average}.dtype", own["dtype"]
    return "ema.dtype", config.ema.dtype


def restore(run: Run, checkpoint: Path) -> list[str]:
    """Load a checkpoint into a run that has not begun.

    An average that the checkpoint does not hold starts from the loaded weights; one that the run no longer keeps is
    left alone.

    Returns:
        What to tell the user of averages that only the run or only the checkpoint has.

    Raises:
        CheckpointError: naming the file that is damaged, or the tensor that is missing or has the wrong shape.
        ConfigError: `trainer.steps` is less than was done.

    Collectives: those of DCP.
    """
    with agreeing("reading the checkpoint's step", Exception):
        progress = stored_scalars(checkpoint)["progress"]
    known = progress["averages"]
    averages = {name: average.state_dict() for name, average in run.bank.items() if name in known}
    loaded = load_training_state(checkpoint, run.network.module, run.optimizer, {"ema": averages})
    for name in averages:
        run.bank[name].load_state_dict(loaded["ema"][name])
    if progress["step"] > run.config.steps:
        raise ConfigError(
            f"trainer.steps: expected at least the {progress['step']} steps done, got {run.config.steps}"
        )
    run.step = progress["step"]
    run.skipped.fill_(progress["skipped"])
    new = [name for name in run.bank if name not in known]
    # A run without any average was asked for; one that keeps others may have dropped these by mistake.
    gone = [name for name in known if name not in run.bank] if run.bank else []
    return [
        *(f"ema/{name} is not in the checkpoint: it starts from the loaded weights" for name in new),
        *(f"warning: ema/{name} of the checkpoint is not kept by this run any more" for name in gone),
    ]
