import pytest
import torch

from raresynth.config import GanConfig
from raresynth.errors import MemoryLimitError, ParamsError
from raresynth.gan.augmentation import POLICIES, Policy, changed, symmetric
from raresynth.gan.presets import check_memory, resolve
from raresynth.gan.rng import Rng
from raresynth.gan.seed_paper.game import SeedPaperGame
from raresynth.gan.seed_paper.networks import Discriminator, Generator, pooled_features


@pytest.mark.parametrize("resolution", [32, 64, 128, 256])
@pytest.mark.parametrize("conv", ["depthwise", "dense"])
def test_generator_shape_and_range(resolution, conv):
    images = Generator(resolution, 8, 4, conv)(torch.randn(2, 8))
    assert images.shape == (2, 3, resolution, resolution)
    assert images.abs().max() <= 1


@pytest.mark.parametrize("resolution", [32, 64, 128, 256])
@pytest.mark.parametrize(("head", "logits_side", "features_side"), [("patch", 8, 8), ("scalar", 1, 4)])
def test_discriminator_shapes(resolution, head, logits_side, features_side):
    network = Discriminator(resolution, 4, head)
    logits, features = network(torch.randn(2, 3, resolution, resolution))
    assert logits.shape == (2, 1, logits_side, logits_side)
    assert features.shape[2:] == (features_side, features_side)
    assert features.flatten(1).shape[1] == network.features


def test_pointwise_before_upsampling_equals_pointwise_after():
    block = Generator(32, 8, 4, "depthwise").blocks[0]
    pointwise, up = block[0], block[1]
    x = torch.randn(2, pointwise.in_channels, 4, 4)
    torch.testing.assert_close(up(pointwise(x)), pointwise(up(x)))


def test_depthwise_generator_has_fewer_parameters():
    sizes = {
        conv: sum(p.numel() for p in Generator(128, 128, 32, conv).blocks.parameters())
        for conv in ("depthwise", "dense")
    }
    assert sizes["depthwise"] * 6 < sizes["dense"]


def test_pooled_features_average_to_8x8():
    features = torch.arange(2 * 16 * 16, dtype=torch.float32).view(1, 2, 16, 16)
    pooled = pooled_features(features)
    assert pooled.shape == (1, 128)
    assert pooled[0, 0] == features[0, 0, :2, :2].mean()


def test_equal_seeds_build_equal_networks_and_leave_the_global_generator_alone():
    settings = resolve(GanConfig(preset="stgan-lite", resolution=32, width=4))
    before = torch.random.get_rng_state()
    first, second, other = (SeedPaperGame(settings, 1, seed, "cpu", finetuning=False) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(first.generator.project.weight, second.generator.project.weight)
    assert not torch.equal(first.generator.project.weight, other.generator.project.weight)


def test_freeze_d_holds_the_blocks_next_to_the_image_in_a_branch_alone():
    settings = resolve(GanConfig(preset="stgan-lite", resolution=32, width=4, batch_size=4))
    universal, branch = (SeedPaperGame(settings, 1, 0, "cpu", finetuning) for finetuning in (False, True))
    assert all(p.requires_grad for p in universal.discriminator.parameters())
    learns = [all(p.requires_grad for p in block.parameters()) for block in branch.discriminator.blocks]
    assert learns == [False, False, *[True] * (len(learns) - 2)]
    before = [p.clone() for p in branch.discriminator.parameters()]
    branch.step(torch.rand(4, 3, 32, 32) * 2 - 1, torch.zeros(4, dtype=torch.long), Rng(torch.Generator()), 0, 10)
    for parameter, old in zip(branch.discriminator.parameters(), before, strict=True):
        assert torch.equal(parameter, old) != parameter.requires_grad


def test_presets_fill_what_is_null_and_leave_what_is_set():
    ours, lite, base = (resolve(GanConfig(preset=preset)) for preset in ("raresynth", "stgan-lite", "dcgan-base"))
    assert resolve(GanConfig()) == ours
    assert (ours.betas, ours.class_power) == ((0.0, 0.99), 0.75)
    assert (lite.generator_conv, lite.discriminator, lite.barlow) == ("depthwise", "patch", "pooled")
    assert (lite.label_smoothing, lite.noise_std, lite.freeze_d, lite.wrap_batches) == (0.1, 0.05, 2, True)
    assert (base.generator_conv, base.discriminator, base.barlow) == ("dense", "scalar", "full")
    assert (base.label_smoothing, base.noise_std, base.freeze_d, base.wrap_batches) == (0.0, 0.0, 0, False)
    assert lite.betas == base.betas == (0.5, 0.999)
    ablated = resolve(GanConfig(preset="dcgan-base", wrap_batches=True, barlow_alpha=0.0))
    assert ablated.wrap_batches
    assert ablated.barlow_alpha == 0.0


def test_a_knob_of_another_preset_is_refused_by_name():
    with pytest.raises(ParamsError, match=r"gan\.barlow_alpha is no knob of the preset raresynth"):
        resolve(GanConfig(barlow_alpha=0.1))
    with pytest.raises(ParamsError, match=r"gan\.gradient_penalty is no knob of the preset stgan-lite"):
        resolve(GanConfig(preset="stgan-lite", gradient_penalty=1.0))


def test_a_full_barlow_matrix_over_the_limit_is_refused():
    settings = resolve(GanConfig(preset="dcgan-base", memory_limit_mb=1))
    check_memory(settings, 512)  # 512 * 512 * 4 bytes = 1 MB
    with pytest.raises(MemoryLimitError, match=r"gan\.memory_limit_mb = 1"):
        check_memory(settings, 513)
    check_memory(resolve(GanConfig(preset="dcgan-base", memory_limit_mb=1, barlow="pooled")), 513)
    check_memory(resolve(GanConfig(preset="dcgan-base", memory_limit_mb=1, barlow_alpha=0.0)), 513)


def seeded(seed):
    return Rng(torch.Generator().manual_seed(seed))


def some_images(n=8, side=32):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("policy", ["none", *POLICIES])
def test_augmentation_depends_on_its_generator_alone_and_lets_gradients_through(policy):
    images = some_images().requires_grad_()
    first, second = (changed(symmetric(images, policy, "all", rng), policy, rng) for rng in (seeded(1), seeded(1)))
    assert first.shape == images.shape
    assert torch.equal(first, second)
    torch.autograd.backward(first.square().sum())
    assert images.grad is not None
    assert images.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("policy", "symmetries", "count"),
    [
        ("none", "all", 1),
        ("paper", "all", 2),
        ("dermoscopy", "all", 8),
        ("dermoscopy", "mirror", 2),
        ("dermoscopy", "none", 1),
        ("paper", "none", 1),
    ],
)
def test_symmetries_are_exactly_the_flips_and_quarter_turns(policy, symmetries, count):
    images = some_images(64)
    seen = set()
    for image, out in zip(images, symmetric(images, policy, symmetries, seeded(3)), strict=True):
        views = {(k, f): torch.rot90(image.flip(2) if f else image, k, (1, 2)) for k in range(4) for f in (False, True)}
        matches = [name for name, view in views.items() if torch.equal(view, out)]
        assert len(matches) == 1
        seen.update(matches)
    assert len(seen) == count
    assert count != 2 or seen == {(0, False), (0, True)}


def change(images: torch.Tensor, monkeypatch, **ranges: float) -> torch.Tensor:
    still = dict.fromkeys(("rotation", "shift", "brightness", "contrast", "saturation", "hue"), 0.0)
    monkeypatch.setitem(POLICIES, "test", Policy(quarter_turns=False, **{**still, **ranges}))
    return changed(images, "test", seeded(0))


def test_without_ranges_nothing_changes(monkeypatch):
    images = some_images()
    torch.testing.assert_close(change(images, monkeypatch), images, atol=1e-5, rtol=0)


def test_shifts_are_whole_pixels(monkeypatch):
    images = some_images()
    for image, out in zip(images, change(images, monkeypatch, shift=0.125), strict=True):
        windows = [image[:, 8 + y : 24 + y, 8 + x : 24 + x] for y in range(-4, 5) for x in range(-4, 5)]
        assert sum(torch.allclose(window, out[:, 8:24, 8:24], atol=1e-4) for window in windows) == 1


def test_rotation_turns_about_the_centre_by_at_most_its_range(monkeypatch):
    # A half plane: its edge passes the centre, so a point's side tells the angle.
    images = torch.where(torch.arange(64) < 32, -1.0, 1.0).expand(16, 3, 64, 64)
    out = change(images, monkeypatch, rotation=10.0)
    offsets = (out[:, 0, 4] < 0).sum(1) - 32  # edge's shift, 27.5 pixels above the centre
    assert offsets.abs().max() <= 27.5 * 0.1763 + 1  # tan 10 degrees
    assert offsets.float().std() > 1
    assert ((out[:, 0, 32] < 0).sum(1) - 32).abs().max() <= 1


def test_grey_stays_grey_under_hue_and_saturation(monkeypatch):
    grey = some_images()[:, :1].expand(8, 3, 32, 32)
    torch.testing.assert_close(change(grey, monkeypatch, saturation=0.5, hue=0.25), grey, atol=1e-4, rtol=0)


def test_hue_turns_colours_about_grey(monkeypatch):
    images = some_images(32)
    out = change(images, monkeypatch, hue=1.0)
    assert not torch.allclose(out, images, atol=0.1)
    torch.testing.assert_close(out.mean(1), images.mean(1), atol=1e-4, rtol=0)


def test_brightness_is_a_factor_within_its_range(monkeypatch):
    flat = torch.zeros(64, 3, 32, 32)  # intensity 1/2
    levels = (change(flat, monkeypatch, brightness=0.1).mean((1, 2, 3)) + 1) / 2
    assert levels.min() >= 0.45 - 1e-6
    assert levels.max() <= 0.55 + 1e-6
    assert levels.std() > 0.01


def test_contrast_keeps_the_mean_grey(monkeypatch):
    images = some_images()
    grey = torch.tensor([0.299, 0.587, 0.114])
    out = change(images, monkeypatch, contrast=0.5)
    means = [torch.einsum("c,nchw->n", grey, x) / 32**2 for x in (images, out)]
    torch.testing.assert_close(means[0], means[1], atol=1e-4, rtol=0)
    assert (out.flatten(1).std(1) / images.flatten(1).std(1) - 1).abs().max() > 0.05
