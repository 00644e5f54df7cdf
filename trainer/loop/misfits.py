"""Turn an error of a forward or a backward into one line that names the parts which do not fit together."""

import dis
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from trainer.distributed.failures import is_loss
from trainer.distributed.sharding import Network
from trainer.errors import ConfigError, DataFailure, listed, message_of, place_of

PARTS = ("model", "task", "data")
TORCH = Path(torch.__file__).parent
OF_THE_MACHINE = ("CUDA error", "cuDNN error", "NCCL", "out of memory", "DataLoader worker")
"""Parts of the messages of errors that are no fault of the configuration."""


@contextmanager
def fitting(keys: Sequence[str], when: str = "", *, any_error: bool, given: str = "") -> Iterator[None]:
    """Raise an error within as a ConfigError that names `keys`, if the parts of the run do not fit together.

    Errors of the machine and of other ranks pass unchanged, and so does a ConfigError.

    Args:
        keys: keys of the parts that take part.
        when: place in the run for the message, such as `in step 2`.
        any_error: whether every other error counts. If not, only errors of torch count, such as those of shapes, types
            and indices, and what the user's code raises by itself passes unchanged.
        given: what the parts got, for the message.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ConfigError) or _of_the_machine(error):
            raise
        if not any_error and _raised_by_own_code(error):
            raise
        when = f" {when}" if when else ""
        fault = "they do not fit together" if len(keys) > 1 else "it fails"
        raise ConfigError(
            f"{', '.join(keys)}: {fault}{when}: {type(error).__name__}: {message_of(error)}"
            f" ({given and f'{given}; '}{place_of(error)}; HYDRA_FULL_ERROR=1 shows the traceback)"
        ) from error


def _of_the_machine(error: Exception) -> bool:
    if isinstance(
        error, torch.OutOfMemoryError | torch.AcceleratorError | OSError | MemoryError | DataFailure
    ):
        return True
    return is_loss(error) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in OF_THE_MACHINE)
    )


def _raised_by_own_code(error: Exception) -> bool:
    """Return whether a `raise` or `assert` outside torch raised the error, or torch does not use its class."""
    if not isinstance(error, RuntimeError | IndexError | ValueError | TypeError | NotImplementedError):
        return True
    last = error.__traceback__
    assert last is not None
    while last.tb_next is not None:
        last = last.tb_next
    code = last.tb_frame.f_code
    instruction = dis.opname[code.co_code[last.tb_lasti]]  # `assert` raises by the same one
    return TORCH not in Path(code.co_filename).parents and instruction == "RAISE_VARARGS"


def check_saveable(model: torch.nn.Module) -> None:
    """Refuse a model with a parameter or persistent buffer that no checkpoint can hold: a sparse or nested one.

    Raises:
        ConfigError: There is one; names it.
    """
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor) and (tensor.is_nested or tensor.layout is not torch.strided):
            kind = "is nested" if tensor.is_nested else f"has layout {tensor.layout}"
            raise ConfigError(
                f"model: {name} {kind}, and a checkpoint holds dense tensors only; keep it dense, or register it as a"
                " buffer with persistent=False"
            )


def check_gradients(network: Network) -> list[str]:
    """Return the names of the trainable parameters that the last backward gave no gradient.

    Raises:
        ConfigError: There are such parameters, and DDP waits for their gradients for ever.
    """
    names = [
        name
        for name, parameter in network.module.named_parameters()
        if parameter.requires_grad and parameter.grad is None
    ]
    if names and network.needs_all_gradients:
        raise ConfigError(
            f"model: the loss gives no gradient to {listed(names)}, and sharding=ddp needs one for every parameter;"
            " freeze them by requires_grad=False, remove them, or choose sharding=fsdp"
        )
    return names
