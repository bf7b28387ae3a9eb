"""The sieve and the judge, on the sample data with a trained encoder."""

import numpy as np
import pytest
from known import fresh

from raresynth.config import SynthesisConfig
from raresynth.dataset.images import load_images
from raresynth.dataset.manifest import read_manifest, write_manifest
from raresynth.quality.controls import blurred, jittered, noised
from raresynth.quality.judge import KidJudge
from raresynth.quality.sieve import TrainSieve

LABEL = "vascular"


@pytest.fixture(scope="module")
def sieve(sample_data, sample_manifest, trained_encoder):
    def build(manifest=sample_manifest, **knobs):
        return TrainSieve(sample_data, manifest, trained_encoder, LABEL, SynthesisConfig(**knobs), None)

    return build


@pytest.fixture(scope="module")
def judge(sample_data, sample_manifest, trained_encoder):
    return KidJudge(sample_data, sample_manifest, trained_encoder, 0, None)


def share(verdicts, why):
    return float(np.mean([verdict == why for verdict in verdicts]))


def test_new_reals_pass_and_copies_do_not(sieve, sample_data, sample_manifest):
    manifest = read_manifest(sample_manifest)
    train = manifest[(manifest["label"] == LABEL) & (manifest["split"] == "train")]
    copies = jittered(np.array(load_images(train, sample_data, 32)), np.random.default_rng(0))
    assert share(sieve().judge(fresh(LABEL, 200, 1001)), None) > 0.9
    assert share(sieve().judge(copies), "near_copy") > 0.9
    assert share(sieve(near_copy_distance=0.0).judge(copies), "near_copy") == 0


def test_what_no_real_looks_like_is_atypical(sieve):
    images = fresh(LABEL, 100, 1003)
    assert share(sieve().judge(images), "atypical") < 0.06
    for worse, at_least in ((noised(images, 40, 0), 0.8), (255 - images, 0.8), (blurred(images, 4), 0.2)):
        assert share(sieve().judge(worse), "atypical") > at_least
    assert share(sieve(typical_share=1.0).judge(255 - images), "atypical") == 0


def test_a_lower_share_is_stricter(sieve):
    images = fresh(LABEL, 200, 1004)
    kept = [share(sieve(typical_share=s).judge(images), None) for s in (1.0, 0.99, 0.8, 0.3)]
    assert kept == sorted(kept, reverse=True)
    assert kept[-1] < 0.6


def test_blocks_of_rows_give_what_one_block_gives(sieve, monkeypatch):
    images = np.concatenate([fresh(LABEL, 20, 1011), 255 - fresh(LABEL, 5, 1012)])
    one = sieve(typical_share=0.8)
    verdicts = one.judge(images)
    monkeypatch.setattr("raresynth.quality.copying.PAIRS_AT_ONCE", 1000)
    blocks = sieve(typical_share=0.8)
    assert blocks._limit == pytest.approx(one._limit, rel=1e-6)
    assert blocks.judge(images) == verdicts
    assert len(set(verdicts)) > 1


def test_of_a_class_with_few_groups_nothing_is_rejected(sieve, sample_manifest, tmp_path):
    manifest = read_manifest(sample_manifest)
    of_class = (manifest["label"] == LABEL) & (manifest["split"] == "train")
    write_manifest(tmp_path / "few.csv", manifest[~of_class | (of_class.cumsum() <= 3)])
    assert share(sieve(tmp_path / "few.csv").judge(255 - fresh(LABEL, 20, 1005)), None) == 1


def test_kid_tells_the_class_from_others_and_gain_who_is_nearer(judge):
    own, other = fresh(LABEL, 200, 1006), fresh("melanoma", 200, 1007)
    assert judge.kid(LABEL, own) < 0.1 * judge.kid(LABEL, other)
    gain, error = judge.gain(LABEL, own, other)
    assert gain > 3 * error > 0
    assert judge.gain(LABEL, other, own)[0] == pytest.approx(-gain)
    same, error = judge.gain(LABEL, own, fresh(LABEL, 200, 1008))
    assert abs(same) < 3 * error


def test_of_a_class_with_too_few_reals_nothing_is_told(judge):
    images = fresh(LABEL, 20, 1009)
    assert judge.kid("unheard-of", images) is None
    assert judge.gain("unheard-of", images, 255 - images) == (0.0, 0.0)


def test_the_judge_looks_at_no_test_image(sample_data, sample_manifest, trained_encoder, judge, tmp_path):
    manifest = read_manifest(sample_manifest)
    manifest.loc[manifest["split"] == "test", "path"] = "nowhere.jpg"
    write_manifest(tmp_path / "manifest.csv", manifest)
    blind = KidJudge(sample_data, tmp_path / "manifest.csv", trained_encoder, 0, None)
    images = fresh(LABEL, 50, 1010)
    assert blind.kid(LABEL, images) == judge.kid(LABEL, images)
