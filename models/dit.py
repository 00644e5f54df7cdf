"""A diffusion transformer with adaLN-zero conditioning (Peebles and Xie, arXiv:2212.09748)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.construction import hidden_width, initialised_once, require_positive

NORM_EPS = 1e-6
TIME_FEATURES = 256
LONGEST_PERIOD = 10_000.0


def sinusoids(position: Tensor, features: int) -> Tensor:
    """Return cosines, then sines, of positions `[n]` at `features / 2` wavelengths, `[n, features]`.

    The wavelengths form a geometric series that begins with 2 pi and stays below 2 pi * LONGEST_PERIOD.
    """
    half = features // 2
    exponent = torch.arange(half, dtype=position.dtype, device=position.device) / half
    angle = position[:, None] * LONGEST_PERIOD**-exponent
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def position_table(side: int, hidden: int) -> Tensor:
    """Return the position embedding of each patch in a grid, from its row and its column.

    Args:
        side: number of rows and of columns of the grid.
        hidden: width of the embedding, divisible by 4.

    Returns:
        float32 `[side * side, hidden]`; the first half of each vector is for the row, the second for the column.
    """
    line = sinusoids(torch.arange(side, dtype=torch.float64, device="cpu"), hidden // 2)
    rows, columns = line.repeat_interleave(side, dim=0), line.repeat(side, 1)
    return torch.cat([rows, columns], dim=1).float()


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Multiply the tokens `[b, n, hidden]` of each sample by 1 + `scale`, then add `shift`, both `[b, hidden]`."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """Transformer block whose condition shifts, scales and gates attention and MLP; initially the identity."""

    def __init__(self, hidden: int, heads: int, mlp_hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(hidden, eps=NORM_EPS, elementwise_affine=False)
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.out = nn.Linear(hidden, hidden)
        up, down = nn.Linear(hidden, mlp_hidden), nn.Linear(mlp_hidden, hidden)
        self.mlp = nn.Sequential(up, nn.GELU(), down)
        self.modulation = nn.Linear(hidden, 6 * hidden)

    def attend(self, x: Tensor) -> Tensor:
        """Apply self-attention over all patches to tokens `[b, n, hidden]`; return the same shape."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Apply the block to tokens `[b, n, hidden]` with a condition `[b, hidden]`; return new tokens."""
        modulation = self.modulation(F.silu(condition))
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=1)
        x = x + gate_a[:, None] * self.attend(modulate(self.norm(x), shift_a, scale_a))
        return x + gate_m[:, None] * self.mlp(modulate(self.norm(x), shift_m, scale_m))


class DiT(nn.Module):
    """Diffusion transformer that makes a prediction for noisy images from their times and classes.

    Args:
        image_size: height and width of the images in pixels (or latents), at least 1.
        patch_size: height and width of a token in pixels, at least 1; it must divide `image_size`.
        in_channels: number of channels of the input and of the output, at least 1.
        hidden: width of the tokens, divisible by `heads`, and by 4 for the position embedding.
        depth: number of blocks, at least 1.
        heads: number of attention heads, at least 1.
        num_classes: number of classes, at least 1. There is one more class embedding, the last one, for "no class".
        mlp_ratio: hidden width of a block's MLP divided by `hidden`, above 0.

    Raises:
        ValueError: An argument is out of its range; the message has its name.
    """

    position: Tensor

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        in_channels: int,
        hidden: int,
        depth: int,
        heads: int,
        num_classes: int,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        require_positive("DiT", image_size=image_size, patch_size=patch_size, in_channels=in_channels)
        require_positive("DiT", hidden=hidden, depth=depth, heads=heads, num_classes=num_classes)
        if image_size % patch_size:
            raise ValueError(f"DiT: patch_size {patch_size} does not divide image_size {image_size}")
        if hidden % heads or hidden % 4:
            raise ValueError(f"DiT: hidden {hidden} must be divisible by heads {heads} and by 4")
        mlp_hidden = hidden_width("DiT", hidden, mlp_ratio)
        self.side = image_size // patch_size
        self.patch_size = patch_size
        self.num_classes = num_classes
        pixels = in_channels * patch_size**2
        with initialised_once(self):
            self.patch = nn.Linear(pixels, hidden)
            self.time = nn.Sequential(nn.Linear(TIME_FEATURES, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
            self.label = nn.Embedding(num_classes + 1, hidden)
            self.blocks = nn.ModuleList([Block(hidden, heads, mlp_hidden) for _ in range(depth)])
            self.norm = nn.LayerNorm(hidden, eps=NORM_EPS, elementwise_affine=False)
            self.modulation = nn.Linear(hidden, 2 * hidden)
            self.out = nn.Linear(hidden, pixels)
            position = torch.empty(self.side**2, hidden, dtype=torch.float32)
            self.register_buffer("position", position, persistent=False)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Return the prediction `[b, c, h, w]` for noisy images `x`.

        Args:
            x: noisy images, `[b, c, h, w]`.
            t: time of each image, float `[b]` in [0, 1000].
            y: class of each image, int64 `[b]`; `num_classes` means "no class". None means "no class" for all images.
        """
        # The embedding is computed in float32 and cast afterwards: in bfloat16, 997 and 1000 are the same number.
        dtype = self.patch.weight.dtype
        time = self.time(sinusoids(t.float(), TIME_FEATURES).to(dtype))
        if y is None:
            y = torch.full_like(t, self.num_classes, dtype=torch.long)
        condition = time + self.label(y)
        tokens = F.pixel_unshuffle(x, self.patch_size).flatten(2).transpose(1, 2)
        tokens = self.patch(tokens.to(dtype)) + self.position.to(dtype)
        for block in self.blocks:
            tokens = block(tokens, condition)
        shift, scale = self.modulation(F.silu(condition)).chunk(2, dim=1)
        pixels = self.out(modulate(self.norm(tokens), shift, scale))
        return F.pixel_shuffle(pixels.transpose(1, 2).unflatten(2, (self.side, self.side)), self.patch_size)

    def init_weights(self) -> None:
        """Set every parameter and buffer, sharded or not, as section 3.2 of the paper describes.

        Biases, modulation and output matrices are zero, so that initially each block is the identity and the network
        returns zero. The embeddings of time and class are normal with standard deviation 0.02. All other matrices are
        Xavier uniform.
        """
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1 or name.endswith("modulation.weight") or name == "out.weight":
                nn.init.zeros_(parameter)
            elif name.startswith(("time.", "label.")):
                nn.init.normal_(parameter, std=0.02)
            else:
                nn.init.xavier_uniform_(parameter)
        with torch.no_grad():
            self.position.copy_(position_table(self.side, self.position.shape[1]))

    def shard_blocks(self) -> list[nn.Module]:
        """Return the transformer blocks in their order."""
        return list(self.blocks)

    def flops_per_sample(self) -> float:
        """Return the FLOPs of one image's forward and backward: 2 per multiply-add; a backward is two forwards."""
        tokens, hidden = self.position.shape
        multiply_adds = 2 * len(self.blocks) * tokens**2 * hidden
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2 and not name.startswith("label."):
                # The condition is one vector per sample, so its matrices are used once; all others once per token.
                once = "modulation" in name or name.startswith("time.")
                multiply_adds += parameter.numel() * (1 if once else tokens)
        return 3.0 * 2.0 * multiply_adds
