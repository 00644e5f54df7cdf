"""Metrics of a whole evaluation set: perplexity, bits per byte, calibration, the distance of two distributions.

Such a metric is not a mean over samples, but live weights and averages must be compared sample by sample. The jackknife
makes this possible. It gives each sample a value so that the mean of the values is the metric. The standard error of
that mean is the jackknife's standard error of the metric, also for the mean of paired differences (B. Efron, "The
Jackknife, the Bootstrap and Other Resampling Plans", 1982, chapters 2 and 3).

All tensors are float64 on the CPU. The jackknife needs the metric of all samples except one, for each sample. Here it
has a closed form, so a metric costs one pass over the samples. The distance of two distributions costs one pass over
all pairs of samples: seconds for 5,000 samples.
"""

import torch
from torch import Tensor

BINS = 15
"""Number of bins of confidence, all equally wide, as in Guo et al. (2017)."""
BLOCK = 1024
"""Most rows of a kernel matrix that are in memory at the same time."""


def jackknifed(whole: Tensor, without: Tensor) -> Tensor:
    """Return one value per sample, whose mean is the metric and whose standard error is the jackknife's.

    The values are Tukey's pseudo-values n theta - (n - 1) theta_(-i) plus a constant. The constant makes their mean
    equal to theta, the usual value of the metric. Without it the mean would be theta after a correction of its bias.

    Args:
        whole: metric theta of all samples, a scalar.
        without: metric theta_(-i) of all samples except sample i, `[samples]`.

    Returns:
        Values `[samples]`. All are equal to the metric if its standard error cannot be estimated, for a single sample
        or after an overflow.
    """
    if len(without) == 1 or not without.isfinite().all():
        return whole.repeat(len(without))
    return whole + (len(without) - 1) * (without.mean() - without)


def perplexity(loss: Tensor) -> Tensor:
    """Return the jackknife values `[samples]` of the perplexity, exp of the mean loss.

    Args:
        loss: loss of each sample in nats per token, `[samples]`; all samples have the same number of tokens.
    """
    return jackknifed(loss.mean().exp(), ((loss.sum() - loss) / (len(loss) - 1)).exp())


def ratio(over: Tensor, under: Tensor) -> Tensor:
    """Return the jackknife values `[samples]` of a ratio of sums, for example of all bits to all bytes.

    Args:
        over: numerator of each sample, `[samples]`.
        under: denominator of each sample, `[samples]`.
    """
    return jackknifed(over.sum() / under.sum(), (over.sum() - over) / (under.sum() - under))


def calibration_error(confidence: Tensor, correct: Tensor) -> Tensor:
    """Return the jackknife values `[samples]` of the expected calibration error.

    The error is the mean of |mean confidence - accuracy| over the bins of confidence, weighted by their numbers of
    samples (C. Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, equation 3). It is the same number as
    `torchmetrics.functional.classification.multiclass_calibration_error` with its defaults.

    The estimate is too high, by an amount that depends on the distances of the confidences from 0 and 1 (A. Kumar, P.
    Liang and T. Ma, "Verified Uncertainty Calibration", NeurIPS 2019). So it can differ between two models that are
    perfectly calibrated, and reports do not use it to decide a comparison.

    Args:
        confidence: probability of the predicted class, `[samples]` in [0, 1].
        correct: 1 if that class is correct, else 0, `[samples]`.
    """
    excess = confidence - correct
    # Bin b contains [b/15, (b+1)/15); a confidence of 1 belongs to the last bin.
    edges = torch.linspace(0, 1, BINS + 1, dtype=confidence.dtype)[1:-1]
    bins = torch.bucketize(confidence, edges, right=True)
    sums = torch.zeros(BINS, dtype=excess.dtype).index_add(0, bins, excess)
    own = sums[bins]
    without = sums.abs().sum() - own.abs() + (own - excess).abs()
    return jackknifed(sums.abs().sum() / len(excess), without / (len(excess) - 1))


def squared_mmd(real: Tensor, generated: Tensor) -> Tensor:
    """Return the jackknife values `[samples]` of the squared maximum mean discrepancy of two sets of samples.

    It is the unbiased estimate for two sets of the same size: about 0, also slightly negative, for equal distributions
    (A. Gretton et al., "A Kernel Two-Sample Test", JMLR 13, 2012, equation 4). The kernel is Gaussian. Its width is the
    median distance between real samples (section 8), so it is the same for all weights.

    Args:
        real: real samples `[samples, ...]`.
        generated: generated samples of the same shape; the jackknife leaves out real and generated sample i together.
    """
    x, y = real.flatten(1), generated.flatten(1)
    distances = torch.pdist(x[:BLOCK])
    distances = distances[distances > 0]
    width = distances.median() if len(distances) else x.new_tensor(1.0)
    # Row i: the sum of k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(x_j, y_i) over all j other than i.
    x_to_y, y_to_x = _kernel_sums(x, y, width)
    rows = _kernel_sums(x, x, width)[0] + _kernel_sums(y, y, width)[0] - x_to_y - y_to_x
    total, n = rows.sum(), len(rows)
    # The total contains each pair twice: once in each of its two rows.
    return jackknifed(total / (n * (n - 1)), (total - 2 * rows) / ((n - 1) * (n - 2)))


def _kernel_sums(a: Tensor, b: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums over j != i of k(a_i, b_j), and of k(a_j, b_i), for each i, `[samples]` each."""
    rows, columns = a.new_zeros(len(a)), a.new_zeros(len(a))
    for first in range(0, len(a), BLOCK):
        block = torch.exp(-torch.cdist(a[first : first + BLOCK], b).square() / (2 * width.square()))
        block.diagonal(first).zero_()
        rows[first : first + BLOCK] = block.sum(1)
        columns += block.sum(0)
    return rows, columns
