"""Metrics of a whole evaluation set: perplexity, bits per byte, calibration, the distance of two distributions.

Such a metric is no mean over samples, and yet live weights and an average are to be compared sample by sample. The
jackknife does both: each sample gets a value, the metric's mean over them is the metric, and the standard error of that
mean, or of the mean of paired differences, is the jackknife's (B. Efron, "The Jackknife, the Bootstrap and Other
Resampling Plans", 1982, chapters 2 and 3).

All tensors are float64 on the CPU. Every metric costs one pass over the samples, for its value without any one of them
has a closed form here; the distance of distributions costs a look at each pair: seconds for 5,000 samples.
"""

import torch
from torch import Tensor

BINS = 15
"""Equal bins of confidence, as in Guo et al. (2017)."""
BLOCK = 1024
"""Rows of a kernel matrix in memory at once."""


def jackknifed(whole: Tensor, without: Tensor) -> Tensor:
    """One value per sample, with the metric as mean and the metric's jackknife error as standard error.

    They are Tukey's pseudo-values, n theta - (n - 1) theta_(-i), moved by a constant (which takes away their
    correction of bias) so that their mean is the metric as everybody computes it.

    Args:
        whole: the metric theta of all samples, a scalar.
        without: the metric of all samples but i, `[samples]`.

    Returns:
        `[samples]`; the metric itself for each where too few samples, or an overflow, allow no error estimate.
    """
    if len(without) == 1 or not without.isfinite().all():
        return whole.repeat(len(without))
    return whole + (len(without) - 1) * (without.mean() - without)


def perplexity(loss: Tensor) -> Tensor:
    """exp of the mean loss.

    Args:
        loss: nats per token of each sample, `[samples]`, samples of equally many tokens.
    """
    return jackknifed(loss.mean().exp(), (_without_each(loss) / (len(loss) - 1)).exp())


def ratio(over: Tensor, under: Tensor) -> Tensor:
    """Sum of `over` by sum of `under`, `[samples]` each; for example nats by bytes, if samples differ in bytes."""
    return jackknifed(over.sum() / under.sum(), _without_each(over) / _without_each(under))


def calibration_error(confidence: Tensor, correct: Tensor) -> Tensor:
    """Expected calibration error: |mean confidence - accuracy| of each bin of confidence, weighted by its samples.

    Its estimate is too high by an amount that depends on how far confidences are from 0 and 1 (A. Kumar, P. Liang and
    T. Ma, "Verified Uncertainty Calibration", NeurIPS 2019): two models without any such error differ in it, and so it
    decides no comparison.

    C. Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, equation 3; the same number as
    `torchmetrics.functional.classification.multiclass_calibration_error` with its defaults.

    Args:
        confidence: probability of the class that was chosen, `[samples]` in [0, 1].
        correct: 1 where that class is right, else 0, `[samples]`.
    """
    excess = confidence - correct
    # Bin b holds [b/15, (b+1)/15); a confidence of 1 belongs to the last.
    edges = torch.linspace(0, 1, BINS + 1, dtype=confidence.dtype)[1:-1]
    bins = torch.bucketize(confidence, edges, right=True)
    sums = torch.zeros(BINS, dtype=excess.dtype).index_add(0, bins, excess)
    own = sums[bins]
    without = sums.abs().sum() - own.abs() + (own - excess).abs()
    return jackknifed(sums.abs().sum() / len(excess), without / (len(excess) - 1))


def squared_mmd(real: Tensor, generated: Tensor) -> Tensor:
    """Squared maximum mean discrepancy of two sets, unbiased, so that it is around 0 (and may be below) if they agree.

    A. Gretton et al., "A Kernel Two-Sample Test", JMLR 13, 2012: equation 4, the form for sets of one size, with a
    Gaussian kernel whose width is the median distance between real samples (section 8), the same for all weights.

    Args:
        real: `[samples, ...]`.
        generated: of the same shape; sample i belongs to real sample i in that both leave together.
    """
    x, y = real.flatten(1), generated.flatten(1)
    apart = torch.pdist(x[:BLOCK])
    apart = apart[apart > 0]
    width = apart.median() if len(apart) else x.new_tensor(1.0)
    # Of each sample: the sum of k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(x_j, y_i) over all others.
    across, crossing = _kernel_sums(x, y, width)
    rows = _kernel_sums(x, x, width)[0] + _kernel_sums(y, y, width)[0] - across - crossing
    total, n = rows.sum(), len(rows)
    # A pair counts twice in the total: once in each of its rows.
    return jackknifed(total / (n * (n - 1)), (total - 2 * rows) / ((n - 1) * (n - 2)))


def _kernel_sums(a: Tensor, b: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of k(a_i, b_j) over j != i, and of k(a_j, b_i), `[samples]` each."""
    rows, columns = a.new_zeros(len(a)), a.new_zeros(len(a))
    for first in range(0, len(a), BLOCK):
        block = torch.exp(-torch.cdist(a[first : first + BLOCK], b).square() / (2 * width.square()))
        block.diagonal(first).zero_()
        rows[first : first + BLOCK] = block.sum(1)
        columns += block.sum(0)
    return rows, columns


def _without_each(values: Tensor) -> Tensor:
    """The sum over all samples but i."""
    return values.sum() - values
