"""DiT: adaLN-zero, conditioning, positions."""

import math

import pytest
import torch
from torch import nn

from models.dit import DiT, position_table, sinusoids


def small_dit() -> DiT:
    torch.manual_seed(0)
    return DiT(image_size=8, patch_size=2, in_channels=3, hidden=32, depth=2, heads=4, num_classes=5)


def awake_dit() -> DiT:
    """A DiT whose zeros are random numbers, so that its output depends on everything."""
    model = small_dit()
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model


def sample(batch: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(batch, 3, 8, 8), torch.rand(batch) * 1000, torch.arange(batch)


def test_the_initial_output_is_exactly_zero() -> None:
    x, t, y = sample()
    assert not small_dit()(x, t, y).any()


def test_initial_blocks_are_the_identity() -> None:
    model = small_dit()
    tokens, condition = torch.randn(2, 16, 32), torch.randn(2, 32)
    for block in model.shard_blocks():
        assert torch.equal(block(tokens, condition), tokens)


def test_the_first_step_already_moves_the_output() -> None:
    """A zero function that could not learn would look just the same at initialisation."""
    model, (x, t, y) = small_dit(), sample()
    (model(x, t, y) - x).square().mean().backward()
    assert model.out.weight.grad.any()


def test_time_class_and_image_all_reach_the_output() -> None:
    model, (x, t, y) = awake_dit(), sample()
    base = model(x, t, y)
    assert not torch.allclose(base, model(x + 0.1, t, y), atol=1e-4)
    assert not torch.allclose(base, model(x, t + 3.0, y), atol=1e-4)
    assert not torch.allclose(base, model(x, t, (y + 1) % 5), atol=1e-4)


def test_samples_do_not_see_each_other() -> None:
    model, (x, t, y) = awake_dit(), sample()
    alone = torch.cat([model(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(model(x, t, y), alone, atol=1e-5, rtol=1e-5)


def test_no_class_is_the_last_embedding() -> None:
    model, (x, t, y) = awake_dit(), sample()
    torch.testing.assert_close(model(x, t), model(x, t, torch.full_like(y, 5)), atol=0, rtol=0)
    assert not torch.allclose(model(x, t), model(x, t, y), atol=1e-4)


def test_a_change_of_one_pixel_stays_in_its_patch_without_blocks() -> None:
    """With closed gates a token knows its own patch alone, and its output must land where it was cut out."""
    model, (x, t, y) = awake_dit(), sample(1)
    for block in model.shard_blocks():
        nn.init.zeros_(block.modulation.weight)
        nn.init.zeros_(block.modulation.bias)
    changed = x.clone()
    changed[0, 1, 5, 2] += 1.0
    rows, columns = torch.nonzero(
        (model(x, t, y) - model(changed, t, y)).abs().sum(dim=(0, 1)) > 1e-6
    ).unbind(1)
    assert set(rows.tolist()) == {4, 5}
    assert set(columns.tolist()) == {2, 3}


def test_where_a_patch_lies_matters() -> None:
    """Without positions the output would move along with the patches."""
    model, (x, t, y) = awake_dit(), sample()
    moved = model(x.roll(2, dims=3), t, y).roll(-2, dims=3)
    assert not torch.allclose(model(x, t, y), moved, atol=1e-4)


def test_positions_tell_every_patch_from_every_other() -> None:
    table = position_table(16, 32)
    assert table.shape == (256, 32)
    distance = torch.cdist(table, table) + torch.eye(256) * 10
    assert distance.min() > 0.1


def test_positions_are_row_then_column() -> None:
    table = position_table(4, 16).view(4, 4, 16)
    assert torch.equal(table[2, 0, :8], table[2, 3, :8])
    assert torch.equal(table[0, 2, 8:], table[3, 2, 8:])
    assert not torch.equal(table[1, 0, :8], table[2, 0, :8])


def test_sinusoids_have_wavelengths_from_2_pi_to_10000() -> None:
    """Cosine and sine of position / 10000^(i/half) (arXiv:1706.03762, section 3.5)."""
    features = sinusoids(torch.tensor([999.0], dtype=torch.float64), 8)[0]
    for i in range(4):
        angle = 999.0 / 10_000.0 ** (i / 4)
        assert features[i].item() == pytest.approx(math.cos(angle), abs=1e-9)
        assert features[4 + i].item() == pytest.approx(math.sin(angle), abs=1e-9)


def test_time_is_embedded_before_it_is_rounded() -> None:
    """bfloat16 holds 8 bits: 997 and 999 would both become 996 or 1000."""
    model = awake_dit().to(torch.bfloat16)
    x, _, y = sample()
    early = model(x, torch.full((4,), 997.0), y)
    late = model(x, torch.full((4,), 999.0), y)
    assert not torch.equal(early, late)


def test_the_position_table_is_not_saved() -> None:
    assert "position" not in small_dit().state_dict()
