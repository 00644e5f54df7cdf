"""GPT: causality, rotary positions, tied embeddings, scale at initialisation."""

import math

import pytest
import torch

from models.gpt import GPT, rotary_table, rotate


def small_gpt(**change: int) -> GPT:
    torch.manual_seed(0)
    return GPT(**{"vocab_size": 17, "context": 24, "n_layer": 2, "n_head": 2, "n_embd": 32, **change})


def test_later_tokens_do_not_change_earlier_logits() -> None:
    model = small_gpt()
    tokens = torch.randint(17, (2, 24))
    changed = tokens.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 17
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :10], after[:, :10], atol=1e-6, rtol=0)
    assert ((before - after)[:, 10:].abs().amax(dim=-1) > 1e-3).all()


def test_a_prefix_has_the_logits_it_has_in_the_whole() -> None:
    model = small_gpt()
    tokens = torch.randint(17, (2, 24))
    torch.testing.assert_close(model(tokens[:, :7]), model(tokens)[:, :7], atol=1e-6, rtol=0)


def test_earlier_tokens_are_attended_to() -> None:
    model = small_gpt()
    tokens = torch.randint(17, (1, 24))
    changed = tokens.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 17
    assert not torch.allclose(model(tokens)[:, -1], model(changed)[:, -1], atol=1e-6)


def test_the_order_of_earlier_tokens_matters() -> None:
    """Without positions a one-layer causal transformer sees its past as a set."""
    model = small_gpt(n_layer=1)
    with torch.no_grad():
        model.blocks[0].attention.qkv.weight.mul_(20)
    tokens = torch.randint(17, (1, 24))
    swapped = tokens.clone()
    swapped[0, 2], swapped[0, 9] = (tokens[0, 2] + 1) % 17, tokens[0, 2]
    tokens[0, 9] = swapped[0, 2]
    assert sorted(tokens[0].tolist()) == sorted(swapped[0].tolist())
    assert not torch.allclose(model(tokens)[:, -1], model(swapped)[:, -1], atol=1e-5)


def test_rotated_products_depend_on_the_distance_alone() -> None:
    """The defining property of rotary positions (arXiv:2104.09864, eq. 11)."""
    table = rotary_table(64, 8, 10_000.0)
    q, k = torch.randn(8), torch.randn(8)

    def product(m: int, n: int) -> float:
        return float(rotate(q[None], table[:, m : m + 1])[0] @ rotate(k[None], table[:, n : n + 1])[0])

    for distance in (0, 1, 5, 30):
        products = [product(start + distance, start) for start in (0, 3, 17, 33)]
        assert products == pytest.approx([products[0]] * 4, abs=1e-4)
    assert product(0, 0) == pytest.approx(float(q @ k), abs=1e-5)
    assert product(5, 0) != pytest.approx(product(0, 5), abs=1e-3)


def test_rotary_angles_are_position_times_falling_frequencies() -> None:
    """theta_i = base^(-2i/d) (arXiv:2104.09864, section 3.2.2), where float32 angles would be off."""
    cos, sin = rotary_table(4096, 6, 500.0)
    for i in range(3):
        angle = 4095 * 500.0 ** (-2 * i / 6)
        assert cos[4095, i].item() == pytest.approx(math.cos(angle), abs=1e-6)
        assert sin[4095, i].item() == pytest.approx(math.sin(angle), abs=1e-6)


def test_rotation_keeps_the_dtype_of_queries() -> None:
    assert rotate(torch.ones(3, 4, dtype=torch.bfloat16), rotary_table(3, 4, 10.0)).dtype == torch.bfloat16


def test_input_and_output_embedding_are_one_parameter() -> None:
    model = small_gpt()
    assert [name for name, p in model.named_parameters() if 17 in p.shape] == ["embed.weight"]
    tokens = torch.randint(17, (1, 4))
    before = model(tokens)
    with torch.no_grad():
        model.embed.weight[3] += 1.0
    unseen = model(torch.full_like(tokens, 5))
    assert not torch.allclose(before, model(tokens))
    assert unseen.shape == (1, 4, 17)


def test_the_rotary_table_is_not_saved() -> None:
    assert "rope" not in small_gpt().state_dict()


def test_an_untrained_model_is_near_uniform() -> None:
    """Cross-entropy within 2 % of log(vocab): nothing starts out confident."""
    model = small_gpt(vocab_size=256, n_embd=128, n_layer=4)
    tokens = torch.randint(256, (8, 24))
    targets = torch.randint(256, (8, 24))
    loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    assert loss.item() == pytest.approx(math.log(256), rel=0.02)


def test_residual_writes_shrink_with_depth() -> None:
    """0.02 / sqrt(2 n_layer) for what writes into the stream, 0.02 for the rest (GPT-2, section 2.3)."""
    model = small_gpt(n_layer=8, n_embd=128)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            std = 0.02 / 4 if name.endswith("out.weight") else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.05), name


def test_a_sequence_beyond_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match=r"25 tokens.*context 24"):
        small_gpt()(torch.zeros(1, 25, dtype=torch.int64))
