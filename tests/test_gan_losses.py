import math

import pytest
import torch

from raresynth.gan.seed_paper.losses import EPSILON, barlow_twins, barlow_twins_full, discriminator_loss, generator_loss


def bce(probability: float, target: float) -> float:
    return -target * math.log(probability) - (1 - target) * math.log(1 - probability)


def sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


def test_discriminator_loss_is_equation_1():
    # sigmoid(0) = 1/2 and sigmoid(ln 3) = 3/4: -log(1/2) - log(1 - 3/4) = log 2 + log 4.
    loss = discriminator_loss(torch.zeros(1), torch.tensor([math.log(3)]), smoothing=0.0)
    assert loss.item() == pytest.approx(math.log(8), rel=1e-6)


def test_discriminator_loss_smooths_to_09_and_01():
    real, fake = [2.0, -1.0], [0.5, -3.0]
    by_hand = sum(bce(sigmoid(x), 0.9) for x in real) / 2 + sum(bce(sigmoid(x), 0.1) for x in fake) / 2
    loss = discriminator_loss(torch.tensor(real), torch.tensor(fake), smoothing=0.1)
    assert loss.item() == pytest.approx(by_hand, rel=1e-6)


def test_smoothed_discriminator_loss_is_least_at_the_targets():
    logit = torch.tensor([math.log(9)])  # sigmoid = 0.9
    best = discriminator_loss(logit, -logit, smoothing=0.1)
    for shift in (-0.5, 0.5):
        assert discriminator_loss(logit + shift, -logit, smoothing=0.1) > best
        assert discriminator_loss(logit, -logit + shift, smoothing=0.1) > best


def test_generator_loss_is_equation_2():
    # -log sigmoid(-ln 3) = -log(1/4)
    assert generator_loss(torch.tensor([-math.log(3)])).item() == pytest.approx(math.log(4), rel=1e-6)


def test_patch_logits_are_averaged():
    logits = torch.tensor([[[[1.0, -2.0], [0.0, 4.0]]]])
    by_hand = sum(-math.log(sigmoid(x)) for x in (1.0, -2.0, 0.0, 4.0)) / 4
    assert generator_loss(logits).item() == pytest.approx(by_hand, rel=1e-6)


def test_losses_stay_finite_and_fp32_for_extreme_bf16_logits():
    logits = torch.tensor([3e4, -3e4], dtype=torch.bfloat16)
    for loss in (discriminator_loss(logits, logits, 0.1), generator_loss(logits)):
        assert loss.dtype == torch.float32
        assert loss.isfinite()


def test_full_barlow_is_equation_3_by_hand():
    # Two features over four images. Columns of z1: (1,1,-1,-1) and (1,-1,1,-1); in z2 the first is negated.
    # Unbiased deviation sqrt(4/3), so C = diag(-1, 1) * 3/4: (1 + 3/4)^2 + (1 - 3/4)^2 = 3.125, off-diagonal 0.
    z1 = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    z2 = z1 * torch.tensor([-1.0, 1.0])
    assert barlow_twins_full(z1, z2, weight=0.5).item() == pytest.approx(3.125, rel=1e-6)


def test_full_barlow_weighs_the_off_diagonal():
    # Both features equal in both views: every C_ij = 3/4. 2 * (1/4)^2 + weight * 2 * (3/4)^2.
    z = torch.tensor([[1.0, 1.0], [1.0, 1.0], [-1.0, -1.0], [-1.0, -1.0]])
    assert barlow_twins_full(z, z, weight=0.1).item() == pytest.approx(0.125 + 0.1 * 1.125, rel=1e-6)


def test_barlow_by_hand():
    # As above with biased deviation 1: C = [[1, 1], [1, 1]], nothing on the diagonal, 2 * weight off it.
    z = torch.tensor([[1.0, 1.0], [1.0, 1.0], [-1.0, -1.0], [-1.0, -1.0]])
    assert barlow_twins(z, z, weight=0.1).item() == pytest.approx(0.2, rel=1e-3)


def naive(z1: torch.Tensor, z2: torch.Tensor, weight: float) -> torch.Tensor:
    z1, z2 = ((z - z.mean(0)) / (z.var(0, correction=0) + EPSILON).sqrt() for z in (z1, z2))
    loss = torch.zeros((), dtype=z1.dtype)
    for i in range(z1.shape[1]):
        for j in range(z1.shape[1]):
            c = (z1[:, i] * z2[:, j]).mean()
            loss = loss + ((1 - c) ** 2 if i == j else weight * c**2)
    return loss


def test_barlow_equals_the_naive_double_sum_with_its_gradient():
    torch.manual_seed(0)
    z1, z2 = torch.randn(6, 20), torch.randn(6, 20)
    mine, theirs = z1.clone().requires_grad_(), z1.clone().requires_grad_()
    fast, slow = barlow_twins(mine, z2, 5e-3), naive(theirs, z2, 5e-3)
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)
    torch.autograd.backward(fast)
    torch.autograd.backward(slow)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:var.*degrees of freedom")
def test_barlow_of_a_batch_of_one_is_finite_and_the_full_form_is_not():
    torch.manual_seed(0)
    z1, z2 = torch.randn(1, 5, requires_grad=True), torch.randn(1, 5)
    loss = barlow_twins(z1, z2, 5e-3)
    torch.autograd.backward(loss)
    assert loss.item() == pytest.approx(5.0)  # C = 0: every (1 - C_ii)^2 is 1
    assert z1.grad is not None
    assert z1.grad.isfinite().all()
    assert barlow_twins_full(z1, z2, 5e-3).isnan()


def test_barlow_never_holds_the_feature_by_feature_matrix():
    # 200,000 features: their matrix would take 160 GB.
    z = torch.randn(4, 200_000, generator=torch.Generator().manual_seed(0))
    assert barlow_twins(z, z, 5e-3).isfinite()
