"""What every model promises: shapes, complete initialisation, honest FLOPs, refusals."""

import inspect
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.dit import DiT
from models.gpt import GPT
from models.mlp import MLP
from models.resnet import ResNet

BATCH = 3
DIT = {
    "image_size": 8,
    "patch_size": 2,
    "in_channels": 2,
    "hidden": 32,
    "depth": 3,
    "heads": 4,
    "num_classes": 5,
}
ARGUMENTS = {
    GPT: {"vocab_size": 11, "context": 16, "n_layer": 3, "n_head": 2, "n_embd": 32, "mlp_ratio": 3.0},
    DiT: DIT,
    ResNet: {
        "in_channels": 2,
        "num_classes": 5,
        "widths": [4, 8, 12],
        "blocks_per_stage": 2,
        "image_size": 9,
    },
    MLP: {"in_features": 18, "hidden": 16, "depth": 3, "num_classes": 5},
}
BLOCKS = {GPT: 3, DiT: 3, ResNet: 6, MLP: 3}
every_model = pytest.mark.parametrize("build", ARGUMENTS, ids=lambda build: build.__name__)

Build = Callable[..., nn.Module]


def inputs(build: Build, batch: int = BATCH) -> tuple[Tensor, ...]:
    if build is GPT:
        return (torch.randint(11, (batch, 16)),)
    if build is DiT:
        return torch.randn(batch, 2, 8, 8), torch.rand(batch) * 1000, torch.arange(batch) % 5
    return (torch.randn(batch, 2, 9, 9) if build is ResNet else torch.randn(batch, 2, 3, 3),)


def filled_with_nan(build: Build) -> nn.Module:
    """A model whose memory came from `to_empty` and holds what is easiest to notice."""
    with torch.device("meta"):
        model = build(**ARGUMENTS[build])
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(float("nan") if tensor.is_floating_point() else -1)
    return model


@every_model
def test_output_shape(build: Build) -> None:
    expected = {GPT: (BATCH, 16, 11), DiT: (BATCH, 2, 8, 8), ResNet: (BATCH, 5), MLP: (BATCH, 5)}[build]
    output = build(**ARGUMENTS[build])(*inputs(build))
    assert output.shape == expected
    assert output.dtype == torch.float32


@every_model
def test_gradients_reach_every_parameter_after_one_step(build: Build) -> None:
    """Zero-initialised gates hide what lies behind them until they have moved once."""
    torch.manual_seed(0)
    model = build(**ARGUMENTS[build])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (model(*inputs(build, batch=8)) - 1).square().mean().backward()
        optimizer.step()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


@every_model
def test_init_weights_leaves_nothing_uninitialised(build: Build) -> None:
    model = filled_with_nan(build)
    model.init_weights()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert (
            tensor.isfinite().all()
            and (tensor >= 0 if not tensor.is_floating_point() else tensor == tensor).all()
        ), name
    assert model.eval()(*inputs(build)).isfinite().all()


@every_model
def test_construction_equals_meta_then_init_weights_from_the_same_seed(build: Build) -> None:
    torch.manual_seed(7)
    direct = build(**ARGUMENTS[build])
    later = filled_with_nan(build)
    torch.manual_seed(7)
    later.init_weights()
    expected = dict(direct.named_parameters()) | dict(direct.named_buffers())
    actual = dict(later.named_parameters()) | dict(later.named_buffers())
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, actual[name]), name


@every_model
def test_init_weights_twice_resets_the_model(build: Build) -> None:
    """Training-time state such as BatchNorm's counters goes back to its start as well."""
    torch.manual_seed(0)
    model = build(**ARGUMENTS[build])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(*inputs(build))
    torch.manual_seed(0)
    model.init_weights()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@every_model
def test_state_dict_round_trip_is_strict(build: Build) -> None:
    torch.manual_seed(1)
    source, target = build(**ARGUMENTS[build]).eval(), build(**ARGUMENTS[build]).eval()
    for parameter in source.parameters():
        nn.init.normal_(parameter)
    target.load_state_dict(source.state_dict(), strict=True)
    sample = inputs(build)
    assert torch.equal(source(*sample), target(*sample))


@every_model
def test_shard_blocks_are_distinct_modules_with_parameters(build: Build) -> None:
    model = build(**ARGUMENTS[build])
    blocks = model.shard_blocks()
    assert len(blocks) == BLOCKS[build]
    names = {id(module): name for name, module in model.named_modules()}
    assert len({names[id(block)] for block in blocks}) == len(blocks)
    parameters = [id(p) for block in blocks for p in block.parameters()]
    assert len(set(parameters)) == len(parameters) > 0


@every_model
def test_flops_agree_with_the_flop_counter(build: Build) -> None:
    """Three times torch's own count of a forward; the math kernel, as the fused CPU one is not counted."""
    model = build(**ARGUMENTS[build])
    for batch in (1, 4):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(*inputs(build, batch))
        assert model.flops_per_sample() == pytest.approx(3 * counter.get_total_flops() / batch, rel=0.02)


@every_model
def test_flops_do_not_need_memory(build: Build) -> None:
    with torch.device("meta"):
        on_meta = build(**ARGUMENTS[build])
    assert on_meta.flops_per_sample() == build(**ARGUMENTS[build]).flops_per_sample() > 0


@every_model
def test_every_argument_is_typed_and_documented(build: Build) -> None:
    """The trainer checks configurations against these types, and people read the ranges."""
    documented = dict(
        re.findall(r"^ +(\w+): (.+)$", (inspect.getdoc(build) or "").split("Args:")[1], re.MULTILINE)
    )
    for name, parameter in inspect.signature(build).parameters.items():
        assert parameter.annotation in (int, float, list[int]), name
        assert re.search(r"at least 1|above 0|divid|divisib", documented[name]), name


@every_model
def test_impossible_sizes_are_refused_by_name(build: Build) -> None:
    for name, value in ARGUMENTS[build].items():
        for bad in ([], [4, 0]) if isinstance(value, list) else (0, -1):
            with pytest.raises(ValueError, match=rf"{build.__name__}.*\b{name}\b.*{re.escape(str(bad))}"):
                build(**{**ARGUMENTS[build], name: bad})


@pytest.mark.parametrize(
    ("build", "change", "named"),
    [
        (GPT, {"n_head": 3}, "n_embd 32"),
        (GPT, {"n_embd": 30, "n_head": 2}, "n_embd 30"),
        (GPT, {"mlp_ratio": 0.01}, "mlp_ratio 0.01"),
        (GPT, {"mlp_ratio": float("nan")}, "mlp_ratio"),
        (GPT, {"rope_base": float("inf")}, "rope_base"),
        (DiT, {"patch_size": 3}, "patch_size 3"),
        (DiT, {"heads": 5}, "hidden 32 .* heads 5"),
        (DiT, {"hidden": 6, "heads": 2}, "hidden 6"),
    ],
)
def test_sizes_that_do_not_fit_each_other_are_refused_by_name(build: Build, change: dict, named: str) -> None:
    with pytest.raises(ValueError, match=f"{build.__name__}.*{named}"):
        build(**{**ARGUMENTS[build], **change})


@every_model
def test_half_precision_weights_give_finite_half_precision_outputs(build: Build) -> None:
    """All-bfloat16 models, images included, as pure bf16 evaluation uses them."""
    model = build(**ARGUMENTS[build]).to(torch.bfloat16)
    sample = [x.bfloat16() if x.is_floating_point() and x.ndim > 1 else x for x in inputs(build)]
    output = model(*sample)
    assert output.dtype == torch.bfloat16
    assert output.isfinite().all()
