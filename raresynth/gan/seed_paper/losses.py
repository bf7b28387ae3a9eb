"""Losses of the seed paper: equations 1 to 3. Logits and features in, fp32 scalars out."""

import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-5
"""Added to variances, so that features without variance normalise to 0 instead of NaN."""


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor, smoothing: float) -> Tensor:
    """Equation 1 with targets 1 - smoothing for real and smoothing for fake; mean over images and patches."""
    return _cross_entropy(real_logits, 1.0 - smoothing) + _cross_entropy(fake_logits, smoothing)


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Equation 2, the non-saturating loss -log D(G(z)); mean over images and patches."""
    return F.softplus(-fake_logits.float()).mean()


def _cross_entropy(logits: Tensor, target: float) -> Tensor:
    """Binary cross-entropy with a constant target: softplus(x) - target * x."""
    logits = logits.float()
    return (F.softplus(logits) - target * logits).mean()


def barlow_twins(z1: Tensor, z2: Tensor, weight: float) -> Tensor:
    """Equation 3 between two views' features, both (N, D), without the D x D matrix.

    With columns normalised (biased variance), C = Z1' Z2 / N, so that sum_ij C_ij^2 = <Z1 Z1', Z2 Z2'> / N^2:
    two N x N matrices suffice. Exact, and finite for N = 1.

    Args:
        weight: lambda, the weight of the off-diagonal terms.
    """
    n = len(z1)
    z1, z2 = (_standardise(z.float()) for z in (z1, z2))
    diagonal = (z1 * z2).sum(0) / n
    squares = ((z1 @ z1.T) * (z2 @ z2.T)).sum() / n**2
    return (1.0 - diagonal).square().sum() + weight * (squares - diagonal.square().sum())


def _standardise(z: Tensor) -> Tensor:
    return (z - z.mean(0)) * (z.var(0, correction=0) + EPSILON).rsqrt()


def barlow_twins_full(z1: Tensor, z2: Tensor, weight: float) -> Tensor:
    """Equation 3 as the base implementation computes it: the whole D x D matrix, unbiased deviation, no epsilon.

    NaN for a batch of one, whose unbiased deviation is 0 / 0: the collapse that the seed paper reports.
    """
    n = len(z1)
    z1, z2 = ((z - z.mean(0)) / z.var(0, correction=1).sqrt() for z in (z1.float(), z2.float()))
    correlation = z1.T @ z2 / n
    diagonal = correlation.diagonal()
    return (1.0 - diagonal).square().sum() + weight * (correlation.square().sum() - diagonal.square().sum())
