"""Write an average that is made from stored weights as one safetensors file, tensor by tensor, from all ranks."""

import json
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from launch.exporting.files import Destination
from launch.merging.writing import in_order, write_file
from launch.synthesizing.bench import Bench, reestimates
from launch.synthesizing.weights import Synthesized
from trainer.distributed.processes import agreeing, own_rank
from trainer.rundir.checkpoints import MARKER
from trainer.rundir.circumstances import versions
from trainer.rundir.directory import sha256_of
from trainer.rundir.files import read_text


def export(out: Destination, bench: Bench, name: str) -> None:
    """Write the state of the model with evaluated weights in it, and with the BatchNorm statistics of their evaluation.

    Raises:
        ConfigError: The file exists or cannot be written; raised on every rank. No file is left.

    Collectives: those of the average and of `Evaluation.reestimate`, and an all-gather for each sharded tensor.
    """
    average, model = bench.averages[name], bench.parts.network.module
    facts = _provenance(bench.basis.step, name, average)
    with average.swapped_into(model):
        if reestimates(name):
            bench.parts.evaluation.reestimate(bench.parts.network)
        state = {
            name: tensor.detach() for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)
        }
        like = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            for name, tensor in state.items()
        }

        def whole(name: str) -> Iterator[Tensor]:
            tensor = state[name]
            yield (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()

        with agreeing("exporting", collectives=True):
            if own_rank() == 0:
                with out.written_aside() as aside:
                    write_file(aside / out.path.name, like, whole, facts, key=out.key)
            else:
                for name in in_order(like):
                    next(whole(name))


def _provenance(step: int, name: str, average: Synthesized) -> dict[str, str]:
    """Return the facts on an average of a step for the header of its file."""
    sources = [
        {
            "path": str(one.path),
            "weights": one.name,
            "step": one.snapshot.step,
            "coefficient": x,
            "sha256": {MARKER: sha256_of(read_text(one.path / MARKER))},
        }
        for one, x in average.parts
    ]
    facts = {"average": name, "step": step, "sources": sources, "versions": versions()}
    return {"posthoc": json.dumps(facts), "format": "pt"}
