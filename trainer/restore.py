"""A run carried on: its newest checkpoint loaded, or one line that says what does not fit and what to do."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.checkpoint import stored_scalars
from trainer.checkpoint_format import CheckpointError, CheckpointMisfit, DamagedCheckpoint
from trainer.compose import thaw, to_config
from trainer.config import Config, ConfigError
from trainer.loop import Run
from trainer.rundir import RunDir
from trainer.training_state import load_training_state


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
        ConfigError: naming the keys of the model that were changed and do not fit, or the file that is damaged.

    Collectives: those of DCP.
    """
    try:
        return restore(run, checkpoint)
    except DamagedCheckpoint as error:
        raise ConfigError(
            f"resume: {error}; remove {checkpoint.name} to go on from an older checkpoint"
        ) from error
    except CheckpointMisfit as error:
        before = _leaves("model", to_config(thaw(run_dir.latest_config())).model)
        now = _leaves("model", config.model)
        changed = [key for key in {**before, **now} if before.get(key, _NONE) != now.get(key, _NONE)]
        if not changed:
            raise ConfigError(f"resume: {error}") from error
        told = "; ".join(
            f"{key}: expected {before.get(key, _NONE)}, got {now.get(key, _NONE)}" for key in changed
        )
        raise ConfigError(f"{told}: the checkpoint does not fit the changed model ({error})") from error
    except CheckpointError as error:
        raise ConfigError(f"resume: {error}") from error


_NONE = "nothing"


def _leaves(key: str, node: Any) -> dict[str, Any]:
    """The values below a key, by their whole keys."""
    return dict(_walk(key, node))


def _walk(key: str, node: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        for name, inner in node.items():
            yield from _walk(f"{key}.{name}", inner)
    else:
        yield key, node


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
