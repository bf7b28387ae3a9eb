"""Losses of the preset `raresynth`. Logits in, fp32 scalars out."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def relativistic(winner: Tensor, loser: Tensor) -> Tensor:
    """softplus(-(winner - loser)), mean over pairs of logits (N,).

    The discriminator's loss has the reals as winners, the generator's the fakes (Jolicoeur-Martineau 2019; R3GAN,
    Huang et al. 2024, equation 2).
    """
    return F.softplus(loser.float() - winner.float()).mean()


def gradient_penalty(judge: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Mean over images of |d logit / d image|^2: R1 on reals, R2 on fakes (Mescheder et al. 2018, equation 9).

    Args:
        judge: the discriminator, in fp32.
        images: (N, 3, R, R).
    """
    images = images.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(judge(images).sum(), images, create_graph=True)
    return gradient.square().flatten(1).sum(1).mean()
