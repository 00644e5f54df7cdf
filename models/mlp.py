"""A multilayer perceptron, the smallest built-in network."""

from itertools import pairwise

from torch import Tensor, nn

from models.construction import initialised_once, require_positive


class MLP(nn.Module):
    """Multilayer perceptron that flattens each sample and returns its class logits.

    Args:
        in_features: number of elements of one sample, at least 1; 64 for 8 x 8 grey images.
        hidden: width of each hidden layer, at least 1.
        depth: number of hidden layers, at least 1.
        num_classes: number of classes, at least 1.

    Raises:
        ValueError: An argument is out of its range; the message has its name.
    """

    def __init__(self, in_features: int, hidden: int, depth: int, num_classes: int) -> None:
        super().__init__()
        require_positive("MLP", in_features=in_features, hidden=hidden, depth=depth, num_classes=num_classes)
        with initialised_once(self):
            widths = [in_features] + [hidden] * depth
            layers = [nn.Linear(wide, next_wide) for wide, next_wide in pairwise(widths)]
            self.blocks = nn.ModuleList([nn.Sequential(layer, nn.ReLU()) for layer in layers])
            self.head = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits `[b, num_classes]` of samples `[b, ...]` with `in_features` elements each."""
        x = x.flatten(1).to(self.head.weight.dtype)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def init_weights(self) -> None:
        """Set every parameter, sharded or not.

        Hidden layers get He's normal distribution (arXiv:1502.01852, eq. 10), the head a normal distribution with
        standard deviation 0.01, and biases are zero.
        """
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                nn.init.zeros_(parameter)
            elif name == "head.weight":
                nn.init.normal_(parameter, std=0.01)
            else:
                nn.init.kaiming_normal_(parameter, nonlinearity="relu")

    def shard_blocks(self) -> list[nn.Module]:
        """Return the hidden layers in their order."""
        return list(self.blocks)

    def flops_per_sample(self) -> float:
        """Return the FLOPs of one sample's forward and backward: 2 per multiply-add; a backward is two forwards."""
        return 3.0 * 2.0 * sum(parameter.numel() for parameter in self.parameters() if parameter.ndim == 2)
