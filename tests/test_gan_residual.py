import math

import pytest
import torch

from raresynth.config import GanConfig
from raresynth.gan.presets import resolve
from raresynth.gan.residual import game as residual_game
from raresynth.gan.residual.game import ResidualGame
from raresynth.gan.residual.losses import gradient_penalty, relativistic
from raresynth.gan.residual.networks import Discriminator, Generator, SkipLayerExcitation, UpBlock
from raresynth.gan.rng import Rng

LABELS = torch.tensor([0, 1, 2, 1])
SMALL = {"resolution": 32, "latent_dim": 8, "width": 4, "batch_size": 4, "precision": "fp32"}


def game(finetuning=False, **knobs) -> ResidualGame:
    return ResidualGame(resolve(GanConfig(**{**SMALL, **knobs})), 3, 0, "cpu", finetuning)


def images(n=4, side=32, seed=0) -> torch.Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def rng(seed=0) -> Rng:
    return Rng(torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("resolution", [32, 64, 128, 256])
def test_shapes_and_ranges_at_every_resolution(resolution):
    drawn = Generator(resolution, 8, 4, 3, grey=False)(torch.randn(4, 8), LABELS, 1.0)
    assert drawn.shape == (4, 3, resolution, resolution)
    assert drawn.abs().max() <= 1
    assert Discriminator(resolution, 4, 3, group=2)(drawn, LABELS, 1.0).shape == (4,)


def test_fresh_blocks_only_enlarge_and_fresh_excitation_changes_nothing():
    block, x = UpBlock(4, 4), torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(
        block(x, torch.randn(2, 128)), block.shortcut(x).repeat_interleave(2, 2).repeat_interleave(2, 3)
    )
    large = torch.randn(2, 6, 16, 16)
    assert torch.equal(SkipLayerExcitation(4, 6)(x, large), large)


def test_without_strength_the_class_does_not_matter_and_with_it_it_does():
    torch.manual_seed(0)
    generator, discriminator = Generator(32, 8, 4, 3, grey=False), Discriminator(32, 4, 3, group=2)
    torch.nn.init.normal_(generator.mapping.signal.weight)
    torch.nn.init.normal_(discriminator.classes.weight)
    latent, other = torch.randn(4, 8), (LABELS + 1) % 3
    for strength, equal in ((0.0, True), (0.5, False)):
        drawn = generator(latent, LABELS, strength)
        assert torch.equal(drawn, generator(latent, other, strength)) is equal
        logits, others = (discriminator(drawn, labels, strength) for labels in (LABELS, other))
        assert torch.equal(logits, others) is equal


def test_the_discriminator_sees_how_much_the_images_of_a_group_differ():
    torch.manual_seed(0)
    discriminator, x = Discriminator(32, 4, 3, group=2), torch.randn(4, 8, 4, 4)
    seen = discriminator._with_deviation(x)
    assert seen.shape == (4, 9, 4, 4)
    assert torch.equal(seen[:, :8], x)
    # The standard deviation of two numbers is half their distance.
    for first in (0, 2):
        expected = (x[first] - x[first + 1]).abs().mean() / 2
        torch.testing.assert_close(seen[first : first + 2, 8], expected.expand(2, 4, 4))
    same = discriminator(images(1).expand(4, -1, -1, -1), LABELS[:1].expand(4), 1.0)
    assert (same - same[0]).abs().max() < 1e-6
    # Each group stands for itself: what is in the other does not matter.
    batch = images(4)
    other = torch.cat([batch[:2], images(2, seed=1)])
    torch.testing.assert_close(discriminator(batch, LABELS, 1.0)[:2], discriminator(other, LABELS, 1.0)[:2])


def test_relativistic_loss_by_hand_and_unmoved_by_a_common_shift():
    winner, loser = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0])
    expected = (math.log(1 + math.exp(-1)) + math.log(2)) / 2
    assert relativistic(winner, loser).item() == pytest.approx(expected, rel=1e-6)
    assert relativistic(winner + 7, loser + 7).item() == pytest.approx(expected, rel=1e-5)
    assert relativistic(torch.tensor([1.0]), torch.tensor([-80.0])).item() < 1e-30


def test_penalty_is_the_mean_squared_gradient_of_a_judge_known_by_hand():
    # D(x) = a . x has gradient a everywhere, and |x|^2 / 2 has x.
    a, x = rng().normal(3, 4, 4), images(2, 4)
    torch.testing.assert_close(gradient_penalty(lambda seen: (seen * a).flatten(1).sum(1), x), a.square().sum())
    torch.testing.assert_close(
        gradient_penalty(lambda seen: seen.square().flatten(1).sum(1) / 2, x), x.square().sum() / 2
    )


def test_penalty_reaches_the_discriminator_and_not_the_images():
    discriminator, x = Discriminator(32, 4, 3, group=2), images()
    penalty = gradient_penalty(lambda seen: discriminator(seen, LABELS, 1.0), x)
    torch.autograd.backward(penalty)
    assert discriminator.stem.weight.grad.abs().sum() > 0
    assert not x.requires_grad


def test_a_step_moves_both_networks_and_the_average_follows():
    playing = game()
    before = {name: [p.clone() for p in net.parameters()] for name, net in playing.networks.items()}
    losses = playing.step(images(), LABELS, rng(), step=0, steps=10)
    playing.average(0.5)
    assert losses.isfinite().all()
    assert losses[1] > 0  # the first step has the penalty
    assert playing.step(images(), LABELS, rng(1), step=1, steps=10)[1] == 0
    for name, network in playing.networks.items():
        assert any(not torch.equal(p, q) for p, q in zip(network.parameters(), before[name], strict=True)), name


def test_class_signal_is_annealed_in():
    playing = game(annealing=(0.25, 0.75))
    assert [playing._class_strength(x) for x in (0.0, 0.25, 0.5, 0.75, 1.0)] == [0, 0, 0.5, 1, 1]
    assert [playing.is_conditional(step, 8) for step in (5, 6)] == [False, True]
    assert game(finetuning=True)._class_strength(0.0) == 1
    assert game(annealing=(0.0, 0.0)).is_conditional(0, 8)


def test_the_rate_falls_to_its_end():
    playing = game()
    for progress, factor in ((0.0, 1.0), (0.3, 1.0), (0.65, 0.1**0.5), (1.0, 0.1)):
        playing.schedule(progress)
        for optimizer in (playing.g_optimizer, playing.d_optimizer):
            assert optimizer.param_groups[0]["lr"] == pytest.approx(playing.settings.learning_rate * factor)
    branch = game(finetuning=True)
    assert [branch.rate(0.0), branch.rate(1.0)] == pytest.approx([0.4, 0.1])


def test_augmentation_grows_while_the_discriminator_is_too_sure_and_shrinks_again(monkeypatch):
    monkeypatch.setattr(residual_game, "ADAPTATION_KIMG", 0.04)
    playing = game(augmentation_target=0.6)
    sure, torn, nothing = torch.ones(4), torch.tensor([1.0, 1.0, 1.0, -1.0]), torch.zeros(4)
    for logits, expected in ((sure, 0.1), (sure, 0.2), (torn, 0.1), (torn, 0.0), (torn, 0.0)):
        playing._note_confidence(logits, nothing)
        playing.adapt()
        assert playing.augmentation_strength == pytest.approx(expected)
    off = game(augmentation_target=0.0)
    off._note_confidence(sure, nothing)
    off.adapt()
    assert off.augmentation_strength == 0


def test_strength_is_the_share_of_images_that_are_changed():
    playing, reals = game(), images(400, 8)
    for strength in (0.0, 0.3, 1.0):
        playing.augmentation_strength = strength
        seen = playing._seen(reals, rng())
        same = (seen == reals).flatten(1).all(1).float().mean().item()
        assert same == pytest.approx(1 - strength, abs=0.06)


def test_state_is_put_back():
    first, second = game(), game()
    first.augmentation_strength = 0.3
    first._note_confidence(torch.ones(4), torch.zeros(4))
    second.restore_extra({key: tensor.clone() for key, tensor in first.extra_state().items()})
    assert second.augmentation_strength == 0.3
    assert torch.equal(first._confidence, second._confidence)
