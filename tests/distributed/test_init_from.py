"""Each rank of a sharded model reads its own part of a source, and no rank holds the model."""

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tests.makers import Net, full, make_run_dir, resident, save_checkpoint, shard
from tests.ranks import RankPool
from trainer.config.schema import InitConfig
from trainer.weights.load import start_from
from trainer.weights.source import copy_values

MIB = 1 << 20
WIDTH, DEPTH = 1024, 16
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
    """The peak of this rank's memory while it loads, above that before, and the bytes of its own part of the model."""
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
        own += parameter.detach().to_local().fill_(0).nbytes
    start_from(str(Path(source).parent / "small.safetensors"), InitConfig(missing=["*.[1-9]*.*"]), model)
    before = {field: resident(field) for field in ("VmRSS", "RssAnon")}
    allocated = [before["RssAnon"]]

    def watched(*args: object) -> None:
        allocated.append(resident("RssAnon"))
        copy_values(*args)

    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now
    with patch("trainer.weights.source.copy_values", watched):
        start_from(source, InitConfig(), model)
    if source.endswith("run"):  # DCP maps no file
        return resident("VmHWM") - before["VmRSS"], own
    # Pages of a mapped file are the system's, which maps 2 MiB of them at once and may drop them at any time.
    assert len(allocated) == DEPTH + 1
    return max(allocated) - before["RssAnon"], own


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc")
def test_no_rank_holds_the_model(ranks: RankPool, tmp_path: Path) -> None:
    torch.manual_seed(3)
    whole = Wide().state_dict()
    save_file({"blocks.0.weight": whole["blocks.0.weight"]}, tmp_path / "small.safetensors")
    size = sum(value.nbytes for value in whole.values())
    for source in sources(tmp_path, whole):
        for grown, own in ranks(4, peak_bytes, source):
            assert own == size // 4
            assert grown < size // 2, f"{source}: {grown / MIB:.1f} MiB"
