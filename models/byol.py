"""The network of BYOL for small images: an encoder, a projector and a predictor (arXiv:2006.07733)."""

from itertools import pairwise

from torch import Tensor, nn

from models.construction import initialised_once, require_positive


class BYOL(nn.Module):
    """Perceptron encoder with the two heads of BYOL. It has LayerNorm, because no rank then needs another's samples.

    Args:
        in_features: number of elements of one sample, at least 1; 64 for 8 x 8 grey images.
        hidden: width of the encoder's layers and of the heads, at least 1.
        features: length of the encoder's output, at least 1.
        projection: length of the projection and of the prediction, at least 1.

    Raises:
        ValueError: An argument is out of its range; the message has its name.
    """

    def __init__(self, in_features: int, hidden: int, features: int, projection: int) -> None:
        super().__init__()
        require_positive(
            "BYOL", in_features=in_features, hidden=hidden, features=features, projection=projection
        )
        with initialised_once(self):
            self.encoder = _perceptron(in_features, hidden, hidden, features)
            self.projector = _perceptron(features, hidden, projection)
            self.predictor = _perceptron(projection, hidden, projection)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the features `[b, features]` of samples `[b, ...]`, their projection and their prediction."""
        features = self.encoder(x.flatten(1))
        projection = self.projector(features)
        return features, projection, self.predictor(projection)

    def init_weights(self) -> None:
        """Set every parameter, sharded or not: He's normal distribution for matrices, norms 1, biases 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)

    def shard_blocks(self) -> list[nn.Module]:
        """Return the encoder and the heads in their order."""
        return [self.encoder, self.projector, self.predictor]


def _perceptron(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for wide, next_wide in pairwise(widths):
        layers += [nn.Linear(wide, next_wide), nn.LayerNorm(next_wide), nn.ReLU()]
    return nn.Sequential(*layers[:-2])
