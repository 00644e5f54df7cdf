"""Distances of generated from real samples in a space of features: Fréchet distance, precision and recall.

Each function returns one value per evaluation sample, like those of `trainer.tasks.set_metrics`, so that live weights
and averages are compared sample by sample. All tensors are float64 on the CPU.

The Fréchet distance of finite sets is too high, by an amount that falls with their size, and precision and recall also
depend on it. So such values are comparable for the same numbers of samples only.
"""

import torch
from torch import Tensor

from trainer.tasks.set_metrics import BLOCK

NEIGHBOURS = 3
"""Neighbour whose distance is the radius around a point of a manifold, as in Kynkäänniemi et al. (2019)."""


def frechet_distance(real: Tensor, generated: Tensor) -> Tensor:
    """Return values `[samples]` whose mean is the Fréchet distance of two Gaussians fitted to the features.

    It is |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)) with means m and unbiased covariances C (M. Heusel et al., "GANs
    Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", NeurIPS 2017, equation 6).

    The values are the distance plus the influence of each sample on it. So the standard error of their mean is that of
    the infinitesimal jackknife (L. A. Jaeckel, "The Infinitesimal Jackknife", 1972). The jackknife itself would cost a
    matrix root per sample.

    Args:
        real: features of the real samples, `[samples, ...]`.
        generated: features of the images generated for each of them, `[samples, images, ...]`.

    Returns:
        Values `[samples]`; all are NaN if a feature is not finite.
    """
    x, y = real.flatten(1), generated.flatten(2)
    if not (x.isfinite().all() and y.isfinite().all()):
        return x.new_full((len(x),), float("nan"))
    all_y = y.flatten(0, 1)
    mean_x, cov_x = _fitted(x)
    mean_y, cov_y = _fitted(all_y)
    root, of_y = _root_and_transport(cov_x, cov_y)
    shift = mean_y - mean_x
    distance = shift.square().sum() + cov_x.trace() + cov_y.trace() - 2 * root
    _, of_x = _root_and_transport(cov_y, cov_x)
    influence = _influence(x - mean_x, -shift, of_x)
    influence = influence + _influence(all_y - mean_y, shift, of_y).view(y.shape[:2]).mean(1)
    return distance + influence - influence.mean()


def precision(real: Tensor, generated: Tensor) -> Tensor:
    """Return for each sample the share of its generated images that are on the manifold of the real ones, `[samples]`.

    A point is on a manifold if it is within the ball around one of its points, whose radius is the distance of that
    point to its third neighbour (T. Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing Generative
    Models", NeurIPS 2019, equations 1 and 2). The standard error of the mean is that for a given manifold.

    Args:
        real: features of the real samples, `[samples, ...]`.
        generated: features of the images generated for each of them, `[samples, images, ...]`.
    """
    y = generated.flatten(2)
    return on_manifold(y.flatten(0, 1), real.flatten(1)).view(y.shape[:2]).mean(1)


def recall(real: Tensor, generated: Tensor) -> Tensor:
    """Return for each real sample whether it is on the manifold of all generated images, `[samples]`.

    The arguments and the manifold are those of `precision`.
    """
    return on_manifold(real.flatten(1), generated.flatten(2).flatten(0, 1))


def on_manifold(points: Tensor, manifold: Tensor) -> Tensor:
    """Return 1 for each point that is on the manifold, else 0, float64 `[points]`.

    Args:
        points: features `[points, length]`.
        manifold: features of the points that span the manifold, `[m, length]`. With fewer than four points the radius
            is the distance to the farthest one; a single point has the radius 0.
    """
    radii = _radii(manifold)
    found = [(torch.cdist(block, manifold) <= radii).any(1) for block in points.split(BLOCK)]
    return torch.cat(found).double()


def _radii(manifold: Tensor) -> Tensor:
    """Return the distance of each point to its third neighbour, itself left out, `[m]`."""
    neighbours = min(NEIGHBOURS, len(manifold) - 1)
    if not neighbours:
        return manifold.new_zeros(1)
    radii = []
    for first in range(0, len(manifold), BLOCK):
        distances = torch.cdist(manifold[first : first + BLOCK], manifold)
        distances.diagonal(first).fill_(torch.inf)
        radii.append(distances.kthvalue(neighbours, dim=1).values)
    return torch.cat(radii)


def _fitted(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and covariance of features `[n, length]`; the covariance is unbiased, and zero for one sample."""
    mean = features.mean(0)
    centred = features - mean
    return mean, centred.T @ centred / max(len(features) - 1, 1)


def _root_and_transport(fixed: Tensor, cov: Tensor) -> tuple[Tensor, Tensor]:
    """Return tr (fixed cov)^(1/2), and the matrix that transports a Gaussian with `cov` to one with `fixed`.

    Half of that matrix is the gradient of the trace with respect to `cov`.
    """
    values, vectors = torch.linalg.eigh(fixed)
    half = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    values, vectors = torch.linalg.eigh(half @ cov @ half)
    roots = values.clamp(min=0).sqrt()
    # Directions in which one of the two has no variance have no gradient.
    smallest = roots.max() * len(roots) * torch.finfo(roots.dtype).eps ** 0.5
    inverse = torch.where(roots > smallest, 1 / roots, 0)
    return roots.sum(), half @ (vectors * inverse) @ vectors.T @ half


def _influence(centred: Tensor, shift: Tensor, transport: Tensor) -> Tensor:
    """Return the influence of each sample on the Fréchet distance, up to a constant, `[n]`."""
    return 2 * centred @ shift + (centred * (centred - centred @ transport)).sum(1)
