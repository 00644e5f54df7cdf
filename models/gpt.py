"""A decoder-only transformer with pre-norm, RMSNorm and tied embeddings, without biases.

The position of a token is a rotation of its query and key (Su et al., arXiv:2104.09864).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.construction import hidden_width, initialised_once, require_positive

INIT_STD = 0.02
NORM_EPS = 1e-6


def rotary_table(context: int, head_dim: int, base: float) -> Tensor:
    """Return cosines and sines of the rotation angles of each position, float32 `[2, context, head_dim / 2]`.

    Args:
        context: number of positions.
        head_dim: width of an attention head, even.
        base: upper limit of the wavelengths divided by 2 pi, in tokens.
    """
    frequency = base ** -(torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim)
    angle = torch.outer(torch.arange(context, dtype=torch.float64, device="cpu"), frequency)
    return torch.stack([angle.cos(), angle.sin()]).float()


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate each pair of components (i, i + d/2) of `x` by the angle of its position.

    The dot product of two rotated vectors depends only on the distance between their positions.

    Args:
        x: queries and keys, `[..., t, d]`.
        rope: cosines and sines of the angles, `[2, t, d/2]`.
    """
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    rotated = torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(first * sin, second, cos)
    return torch.cat(rotated, dim=-1).type_as(x)


class Attention(nn.Module):
    """Causal self-attention with rotated queries and keys."""

    def __init__(self, n_embd: int, n_head: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.out = nn.Linear(n_embd, n_embd, bias=False)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """Apply causal self-attention to `x` `[b, t, n_embd]`; `rope` is a `rotary_table`. Return the same shape."""
        qkv = self.qkv(x).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotate(qkv[:2], rope)
        y = F.scaled_dot_product_attention(q, k, qkv[2], is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """MLP of two matrices with a GELU between them."""

    def __init__(self, n_embd: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(n_embd, hidden, bias=False)
        self.out = nn.Linear(hidden, n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the MLP to `x` `[b, t, n_embd]`; return the same shape."""
        return self.out(F.gelu(self.up(x)))


class Block(nn.Module):
    """Transformer block: attention, then the MLP, each with a residual connection."""

    def __init__(self, n_embd: int, n_head: int, hidden: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(n_embd, eps=NORM_EPS)
        self.attention = Attention(n_embd, n_head)
        self.mlp_norm = nn.RMSNorm(n_embd, eps=NORM_EPS)
        self.mlp = FeedForward(n_embd, hidden)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """Apply the block to `x` `[b, t, n_embd]`; `rope` is a `rotary_table`. Return the same shape."""
        x = x + self.attention(self.attention_norm(x), rope)
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """Causal transformer that returns the logits of the next token.

    Args:
        vocab_size: number of token ids, at least 1; 256 for bytes.
        context: length of the longest sequence in tokens, at least 1.
        n_layer: number of blocks, at least 1.
        n_head: number of attention heads, at least 1; `n_embd / n_head` must be a whole, even number.
        n_embd: width of the residual stream, at least 1.
        mlp_ratio: hidden width of a block's MLP divided by `n_embd`, above 0.
        rope_base: upper limit of the wavelengths of the rotary positions divided by 2 pi, in tokens, above 0.

    Raises:
        ValueError: An argument is out of its range; the message has its name.
    """

    rope: Tensor

    def __init__(
        self,
        vocab_size: int,
        context: int,
        n_layer: int,
        n_head: int,
        n_embd: int,
        mlp_ratio: float = 4.0,
        rope_base: float = 10_000.0,
    ) -> None:
        super().__init__()
        require_positive("GPT", vocab_size=vocab_size, context=context, n_layer=n_layer, rope_base=rope_base)
        require_positive("GPT", n_head=n_head, n_embd=n_embd)
        if n_embd % (2 * n_head):
            raise ValueError(f"GPT: n_embd {n_embd} must be an even multiple of n_head {n_head}")
        hidden = hidden_width("GPT", n_embd, mlp_ratio)
        self.context = context
        self.rope_base = rope_base
        with initialised_once(self):
            self.embed = nn.Embedding(vocab_size, n_embd)
            self.blocks = nn.ModuleList([Block(n_embd, n_head, hidden) for _ in range(n_layer)])
            self.norm = nn.RMSNorm(n_embd, eps=NORM_EPS)
            rope = torch.empty(2, context, n_embd // n_head // 2, dtype=torch.float32)
            self.register_buffer("rope", rope, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits `[b, t, vocab_size]` of the token that follows each of `tokens`, int64 `[b, t]`.

        Raises:
            ValueError: The sequence is longer than `context`.
        """
        length = tokens.shape[1]
        if length > self.context:
            raise ValueError(f"GPT: a sequence of {length} tokens is longer than context {self.context}")
        rope = self.rope[:, :length]
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, rope)
        # The embedding is used here too. A separate head with a tied weight would lose the tie in `to_empty` or in
        # sharding.
        return F.linear(self.norm(x), self.embed.weight)

    def init_weights(self) -> None:
        """Set every parameter and buffer, sharded or not, as in GPT-2.

        The weights of the norms are one. Matrices are normal with standard deviation 0.02. For matrices that write into
        the residual stream, the standard deviation is divided by the square root of the number of such matrices, so
        that the variance of the stream does not grow with depth (Radford et al. 2019, section 2.3).
        """
        residual_std = INIT_STD / (2 * len(self.blocks)) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=residual_std if name.endswith("out.weight") else INIT_STD)
        with torch.no_grad():
            self.rope.copy_(rotary_table(self.context, 2 * self.rope.shape[2], self.rope_base))

    def shard_blocks(self) -> list[nn.Module]:
        """Return the transformer blocks in their order."""
        return list(self.blocks)

    def flops_per_sample(self) -> float:
        """Return the FLOPs of forward and backward of `context` tokens: 2 per multiply-add; a backward is two forwards.

        Each matrix is used once per token. All of attention is counted, although half of it is masked (as in PaLM,
        arXiv:2204.02311, appendix B).
        """
        matrices = sum(parameter.numel() for parameter in self.parameters() if parameter.ndim == 2)
        attention = 2 * len(self.blocks) * self.context * self.embed.embedding_dim
        return 3.0 * 2.0 * self.context * (matrices + attention)
