"""Each rank of a sharded model reads its own part of a source, and no rank holds the model."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tests.makers import Net, full, make_run_dir, shard
from tests.ranks import RankPool
from trainer.checkpoint.store import save_checkpoint
from trainer.config.schema import InitConfig
from trainer.weights.load import start_from

MIB = 1 << 20
WIDTH, DEPTH = 1024, 8
"""A model of DEPTH matrices of 4 MiB."""


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH))


def sources(folder: Path, whole: dict[str, Tensor]) -> list[str]:
    """The same weights as safetensors, as a file of torch.save, and as a checkpoint of one process."""
    save_file(whole, folder / "a.safetensors")
    torch.save(whole, folder / "a.pt")
    run_dir = make_run_dir(folder / "run")
    progress = {"step": 4, "samples": 4, "skipped": 0, "lr": 0.0, "averages": []}
    save_checkpoint(run_dir.checkpoints, 4, {"model": whole, "progress": progress}, keep=1)
    return [str(folder / name) for name in ("a.safetensors", "a.pt", "run")]


def loaded(layout: str, source: str, dtype: torch.dtype) -> dict[str, Tensor]:
    model = shard(Net().to(dtype), layout)
    start_from(source, InitConfig(), model)
    return {name: full(value) for name, value in model.state_dict().items()}


def test_every_sharding_loads_the_whole_weights(ranks: RankPool, tmp_path: Path) -> None:
    torch.manual_seed(3)
    whole = Net().state_dict()
    for source in sources(tmp_path, whole):
        for world, layout in ((2, "fsdp"), (4, "hsdp"), (4, "partial")):
            for dtype in (torch.float32, torch.bfloat16):
                for found in ranks(world, loaded, layout, source, dtype):
                    for name, value in whole.items():
                        expected = value.to(dtype) if value.is_floating_point() else value
                        assert torch.equal(found[name], expected), (source, layout, name)


def columns_loaded(source: str) -> Tensor:
    """The weight of a layer that is sharded over its columns, as tensor parallelism does."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = nn.Linear(5, 7)
    model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Shard(1)]))
    start_from(source, InitConfig(), model)
    return full(model.weight.detach())


def test_a_tensor_that_is_sharded_over_its_columns_loads(ranks: RankPool, tmp_path: Path) -> None:
    whole = nn.Linear(5, 7).state_dict()
    for source in sources(tmp_path, whole):
        for found in ranks(2, columns_loaded, source):
            assert torch.equal(found, whole["weight"])


def refused_everywhere(source: str) -> str:
    model = shard(Net(), "fsdp")
    with pytest.raises(Exception) as error:
        start_from(source, InitConfig(), model)
    return str(error.value)


def test_every_rank_refuses_the_same(ranks: RankPool, tmp_path: Path) -> None:
    whole = Net().state_dict()
    del whole["gate.weight"]
    for source in sources(tmp_path, whole):
        first, second = ranks(2, refused_everywhere, source)
        assert first == second
        assert first.startswith("init_from: the source has no gate.weight; keep")


def peak_bytes(source: str) -> tuple[int, int]:
    """The peak of this rank's memory while it loads, above that before, and the bytes of its own part."""
    with torch.device("meta"):
        model = Wide()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    own = 0
    for parameter in model.parameters():
        assert isinstance(parameter, DTensor)
        own += parameter.to_local().fill_(0).nbytes
    start_from(str(Path(source).parent / "small.safetensors"), InitConfig(missing=["*.[1-9].*"]), model)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now
    start_from(source, InitConfig(), model)
    return resident("VmHWM") - before, own


def resident(field: str) -> int:
    """The anonymous memory of this process: mapped files, which the system may drop at any time, do not count."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) * 1024
