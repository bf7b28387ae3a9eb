import json

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics
from test_classifier_training import train

from raresynth.classifier.arms import ARMS
from raresynth.classifier.evaluation import (
    ArmResult,
    EvaluationReport,
    accuracy_score,
    choose_best_real,
    decide_release,
    evaluate,
    paired_differences,
)
from raresynth.classifier.statistics import (
    HEADLINE,
    bootstrap,
    bootstrap_weights,
    confusion_matrices,
    figures,
    fit_temperature,
    interval,
    softmax,
    swap_margins,
)
from raresynth.classifier.training import ClassifierReport
from raresynth.config import ClassifierConfig, ReleaseConfig
from raresynth.errors import CheckpointError, DataError
from raresynth.lineage import read_report

SHARES = [0.6, 0.25, 0.1, 0.05]


def predictions(n: int, skill: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Class indices (n,) and probabilities (n, 4) that know the class the better the larger `skill`."""
    rng = np.random.default_rng(seed)
    targets = np.r_[np.arange(4), rng.choice(4, n - 4, p=SHARES)]
    # Rounded, so that scores tie.
    return targets, softmax((rng.normal(size=(n, 4)) + skill * np.eye(4)[targets]).round(1))


def each_its_own_group(n: int) -> np.ndarray:
    return np.arange(n).astype(str)


class TestFigures:
    def test_equal_to_scikit_learn_under_any_weights(self):
        targets, probabilities = predictions(300, 1.0)
        predicted = probabilities.argmax(1)
        weights = np.random.default_rng(1).integers(0, 4, (3, 300)).astype(float)
        result = figures(targets, probabilities, weights)
        for row, w in enumerate(weights):
            accuracy = metrics.accuracy_score(targets, predicted, sample_weight=w)
            balanced = metrics.balanced_accuracy_score(targets, predicted, sample_weight=w)
            f1 = metrics.f1_score(targets, predicted, average=None, sample_weight=w)
            auc = [metrics.roc_auc_score(targets == c, probabilities[:, c], sample_weight=w) for c in range(4)]
            recall = metrics.recall_score(targets, predicted, average=None, sample_weight=w)
            confusion = metrics.confusion_matrix(targets, predicted, sample_weight=w)
            assert result.headline["accuracy"][row] == pytest.approx(accuracy)
            assert result.headline["balanced_accuracy"][row] == pytest.approx(balanced)
            assert result.headline["macro_f1"][row] == pytest.approx(f1.mean())
            assert result.headline["macro_auc"][row] == pytest.approx(np.mean(auc))
            assert result.per_class["recall"][row] == pytest.approx(recall)
            assert result.per_class["f1"][row] == pytest.approx(f1)
            assert result.per_class["auc"][row] == pytest.approx(auc)
            assert confusion_matrices(targets, probabilities, weights)[row] == pytest.approx(confusion)

    def test_by_hand(self):
        targets = np.array([0, 0, 0, 1])
        probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.3, 0.7]])
        result = figures(targets, probabilities)
        assert result.headline["accuracy"] == pytest.approx(3 / 4)
        assert result.headline["balanced_accuracy"] == pytest.approx((2 / 3 + 1) / 2)
        assert result.headline["macro_f1"] == pytest.approx((4 / 5 + 2 / 3) / 2)
        assert result.per_class["auc"][0] == pytest.approx([2.5 / 3, 2.5 / 3])
        # Bins of 1/15: the gaps 0.9 - 1 and 0.8 - 1 lie in bins 13 and 12; 0.7 - 0 and 0.7 - 1 share bin 10.
        assert result.headline["calibration_error"] == pytest.approx((0.1 + 0.2 + 0.4) / 4)

    def test_auc_counts_pairs_under_fractional_weights_with_ties(self):
        rng = np.random.default_rng(0)
        targets = rng.integers(0, 5, 200)
        probabilities = rng.dirichlet(np.ones(6), 200).round(2)  # of class 5 there is no image
        weights = rng.random((3, 200)) * rng.integers(0, 2, (3, 200))
        auc = figures(targets, probabilities, weights).per_class["auc"]
        for c in range(5):
            own, scores = targets == c, probabilities[:, c]
            wins = (scores[own][:, None] > scores[~own]) + (scores[own][:, None] == scores[~own]) / 2
            for w, area in zip(weights, auc[:, c], strict=True):
                assert area == pytest.approx(w[own] @ wins @ w[~own] / (w[own].sum() * w[~own].sum()), abs=1e-12)
        assert np.isnan(auc[:, 5]).all()

    def test_class_that_a_resample_lacks_is_left_out_of_the_means(self):
        targets, probabilities = np.array([0, 1, 2]), np.eye(3) * 0.7 + 0.1
        result = figures(targets, probabilities, np.array([[1.0, 1.0, 0.0]]))
        assert np.isnan(result.per_class["recall"][0, 2])
        assert np.isnan(result.per_class["auc"][0, 2])
        assert result.headline["balanced_accuracy"] == pytest.approx(1)
        assert result.headline["macro_f1"] == pytest.approx(1)

    def test_perfect_and_blind_predictions(self):
        targets = np.arange(40) % 4
        perfect, blind = figures(targets, np.eye(4)[targets]), figures(targets, np.full((40, 4), 0.25))
        assert all(perfect.headline[name] == (0 if name == "calibration_error" else 1) for name in HEADLINE)
        assert blind.headline["macro_auc"] == 0.5
        assert blind.headline["balanced_accuracy"] == 0.25
        assert blind.headline["calibration_error"] == 0


class TestBootstrap:
    def test_interval_of_accuracy_is_that_of_a_binomial(self):
        n, hits = 400, 300
        targets = np.zeros(n, int)
        right = np.arange(n) < hits
        probabilities = np.where(right[:, None], [0.9, 0.1], [0.1, 0.9])
        samples = bootstrap(targets, {"arm": probabilities}, each_its_own_group(n), 10_000, 0)["arm"]
        accuracy = samples.headline["accuracy"]
        deviation = np.sqrt(0.75 * 0.25 / n)
        assert accuracy.std() == pytest.approx(deviation, rel=0.03)
        assert interval(accuracy) == pytest.approx((0.75 - 1.96 * deviation, 0.75 + 1.96 * deviation), abs=0.004)

    def test_correlated_groups_widen_the_interval_by_the_root_of_their_size(self):
        targets = np.zeros(400, int)
        right = np.repeat(np.arange(100) < 70, 4)
        probabilities = np.where(right[:, None], [0.9, 0.1], [0.1, 0.9])
        alone = bootstrap(targets, {"a": probabilities}, each_its_own_group(400), 5000, 0)["a"].headline["accuracy"]
        grouped_by = np.repeat(each_its_own_group(100), 4)
        grouped = bootstrap(targets, {"a": probabilities}, grouped_by, 5000, 0)["a"].headline["accuracy"]
        assert grouped.std() / alone.std() == pytest.approx(2, rel=0.05)

    def test_images_of_a_group_come_together_and_groups_keep_their_number(self):
        groups = np.array(["a", "b", "a", "c", "c", "c"])
        weights = np.concatenate(list(bootstrap_weights(groups, 1000, 0)))
        assert weights.shape == (1000, 6)
        assert (weights[:, 0] == weights[:, 2]).all()
        assert (weights[:, 3] == weights[:, 5]).all()
        assert (weights[:, [0, 1, 3]].sum(1) == 3).all()
        assert weights.mean(0) == pytest.approx(np.ones(6), abs=0.1)

    def test_pieces_do_not_repeat_and_the_seed_decides(self, monkeypatch):
        monkeypatch.setattr("raresynth.classifier.statistics._WEIGHTS_AT_ONCE", 500)
        pieces = list(bootstrap_weights(each_its_own_group(50), 25, 0))
        assert [len(piece) for piece in pieces] == [10, 10, 5]
        assert (pieces[0] != pieces[1]).any()
        again, other = (np.concatenate(list(bootstrap_weights(each_its_own_group(50), 25, seed))) for seed in (0, 1))
        assert (np.concatenate(pieces) == again).all()
        assert (again != other).any()

    def test_figures_are_those_of_the_weights_in_pieces_or_not(self, monkeypatch):
        targets, probabilities = predictions(60, 1.0)
        groups = each_its_own_group(60)
        whole = figures(targets, probabilities, next(bootstrap_weights(groups, 25, 0)))
        monkeypatch.setattr("raresynth.classifier.statistics._WEIGHTS_AT_ONCE", 500)
        pieces = bootstrap(targets, {"arm": probabilities}, groups, 25, 0)["arm"]
        for name in HEADLINE:
            assert pieces.headline[name] == pytest.approx(whole.headline[name], abs=1e-12)
        assert pieces.per_class["auc"] == pytest.approx(whole.per_class["auc"], abs=1e-12, nan_ok=True)

    def test_pairing_makes_the_difference_narrower_than_its_parts(self):
        targets, base = predictions(400, 1.5)
        better = base.copy()
        better[:20] = np.eye(4)[targets[:20]]
        arms = bootstrap(targets, {"base": base, "better": better}, each_its_own_group(400), 2000, 0)
        base_accuracy, better_accuracy = (arms[arm].headline["accuracy"] for arm in ("base", "better"))
        assert (better_accuracy - base_accuracy).std() < base_accuracy.std() / 2


class TestSwapMargins:
    def test_all_swaps_of_few_groups_by_hand(self):
        """The first model is right on all ten images, the second on none: a draw differs by |2 k - 10| / 10."""
        targets, right = np.zeros(10, int), np.tile([0.9, 0.1], (10, 1))
        alone = swap_margins(targets, right, 1 - right, each_its_own_group(10), 20_000, 0)["accuracy"]
        assert alone == pytest.approx(0.6)  # P(k in {0, 1, 9, 10}) = 2.1 %, with 2 and 8 10.9 %
        together = swap_margins(targets, right, 1 - right, np.repeat(["a", "b"], 5), 20_000, 0)["accuracy"]
        assert together == 1  # two groups that agree are one chance in two

    def test_equal_models_leave_no_margin(self):
        targets, probabilities = predictions(50, 1.0)
        margins = swap_margins(targets, probabilities, probabilities, each_its_own_group(50), 100, 0)
        assert margins == pytest.approx(dict.fromkeys(HEADLINE, 0.0), abs=1e-12)

    def test_pieces_make_no_difference_and_the_seed_decides(self, monkeypatch):
        (targets, first), (_, second) = predictions(60, 1.0), predictions(60, 1.5, 1)
        args = (targets, first, second, each_its_own_group(60))
        whole, other = swap_margins(*args, 500, 0), swap_margins(*args, 500, 1)
        monkeypatch.setattr("raresynth.classifier.statistics._WEIGHTS_AT_ONCE", 5000)
        assert swap_margins(*args, 500, 0) == pytest.approx(whole, abs=0.02)
        assert other != whole


class TestTemperature:
    def test_undoes_a_known_scaling(self):
        rng = np.random.default_rng(0)
        logits = rng.normal(size=(20_000, 4)) * 2
        chances = softmax(logits)
        targets = (chances.cumsum(1) < rng.random((20_000, 1))).sum(1)
        assert fit_temperature(logits * 3, targets) == pytest.approx(3, rel=0.05)
        assert fit_temperature(logits / 2, targets) == pytest.approx(0.5, rel=0.05)

    def test_is_the_minimum_of_the_cross_entropy(self):
        targets, probabilities = predictions(200, 0.5)
        logits = np.log(probabilities) * 4

        def loss(temperature: float) -> float:
            return -np.log(softmax(logits / temperature)[np.arange(200), targets]).mean()

        best = fit_temperature(logits, targets)
        assert loss(best) < min(loss(best * 1.02), loss(best / 1.02))

    def test_stays_within_its_limits(self):
        targets = np.arange(8) % 4
        assert fit_temperature(np.eye(4)[targets], targets) == pytest.approx(0.05)
        assert fit_temperature(-np.eye(4)[targets], targets) == pytest.approx(20)


def decide(synthetic: np.ndarray, real: np.ndarray, targets: np.ndarray, samples: int = 2000, **rule):
    release = ReleaseConfig(bootstrap_samples=samples, **rule)
    arms = {"real+weights": real, "real+synthetic": synthetic}
    groups = each_its_own_group(len(targets))
    resamples = bootstrap(targets, arms, groups, samples, 0)
    points = {arm: figures(targets, probabilities) for arm, probabilities in arms.items()}
    margins = swap_margins(targets, synthetic, real, groups, samples, 0)
    differences = paired_differences(points, resamples, margins, "real+weights")
    return differences, decide_release(differences, "real+weights", release, "")


class TestRelease:
    def test_improving_arm_is_approved(self):
        targets, real = predictions(600, 1.0)
        _, synthetic = predictions(600, 3.0)
        differences, release = decide(synthetic, real, targets)
        assert differences["balanced_accuracy"].low > 0.1
        assert (release.decision, release.arm, release.best_real_arm) == ("approved", "real+synthetic", "real+weights")
        assert "help" in " ".join(release.reasons)

    def test_equal_arm_differs_by_exactly_nothing_and_is_rejected(self):
        targets, real = predictions(600, 1.0)
        differences, release = decide(real, real, targets)
        assert all((d.value, d.low, d.high) == (0, 0, 0) for d in differences.values())
        assert (release.decision, release.arm) == ("rejected", "real+weights")

    def test_gain_that_may_be_chance_is_rejected(self):
        targets, real = predictions(600, 1.0)
        synthetic = real.copy()
        synthetic[:2] = np.eye(4)[targets[:2]]
        differences, release = decide(synthetic, real, targets)
        assert differences["balanced_accuracy"].value > 0 >= differences["balanced_accuracy"].low
        assert release.decision == "rejected"
        assert "no gain is shown" in " ".join(release.reasons)

    def test_equal_arms_are_approved_as_rarely_as_the_gate_says_where_classes_are_tiny(self):
        """Two images each of two classes: resampling alone approves equal arms about twice as often as 2.5 %."""
        rng = np.random.default_rng(0)
        targets = np.repeat(np.arange(4), [2, 2, 20, 60])
        approved = resampled = 0
        for _ in range(400):
            synthetic, real = (np.eye(4)[np.where(rng.random(84) < 0.7, targets, (targets + 1) % 4)] for _ in range(2))
            differences, release = decide(synthetic, real, targets, samples=200)
            approved += release.decision == "approved"
            arms = bootstrap(targets, {"a": synthetic, "b": real}, each_its_own_group(84), 200, 0)
            low, _ = interval(arms["a"].headline["balanced_accuracy"] - arms["b"].headline["balanced_accuracy"])
            assert differences["balanced_accuracy"].low <= low
            resampled += low > 0
        assert approved / 400 <= 0.025 + 2 * np.sqrt(0.025 * 0.975 / 400)
        assert resampled > approved

    def test_a_gain_as_large_as_chance_alone_may_give_is_not_beyond_it(self):
        """One class of three images, another of forty that both know: three right against none is one draw in four."""
        targets = np.repeat([0, 1], [3, 40])
        known = np.eye(2)[targets]
        synthetic, real = known.copy(), known.copy()
        real[:3] = [0, 1]
        differences, release = decide(synthetic, real, targets)
        assert (differences["balanced_accuracy"].value, differences["balanced_accuracy"].low) == (0.5, 0.0)
        assert release.decision == "rejected"

    def test_the_rule_comes_from_params(self):
        targets, real = predictions(600, 1.0)
        _, synthetic = predictions(600, 3.0)
        assert decide(synthetic, real, targets, min_difference=0.9)[1].decision == "rejected"
        assert decide(real, real, targets, min_difference=-0.01)[1].decision == "approved"
        assert decide(synthetic, real, targets, metric="macro_auc")[1].difference.value < 0.5

    def test_without_a_synthetic_arm_the_best_real_one_is_shipped_with_the_reason(self):
        release = decide_release({}, "real", ReleaseConfig(), "no synthetic image was accepted")
        assert (release.decision, release.arm, release.difference) == ("rejected", "real", None)
        assert "no synthetic image was accepted" in " ".join(release.reasons)

    def test_accuracy_score_is_the_paired_ratio_to_the_best_real_arm(self):
        targets, real = predictions(600, 3.0)
        _, synthetic = predictions(600, 1.0)
        arms = {"real": real, "synthetic": synthetic}
        resamples = bootstrap(targets, arms, each_its_own_group(len(targets)), 2000, 0)
        points = {arm: figures(targets, probabilities) for arm, probabilities in arms.items()}
        score = accuracy_score(points, resamples, "real")
        ratio = points["synthetic"].headline["balanced_accuracy"] / points["real"].headline["balanced_accuracy"]
        assert score.value == pytest.approx(float(ratio[0]))
        assert score.low < score.value < score.high < 1
        assert accuracy_score(points, resamples, "synthetic").value == 1
        assert accuracy_score({"real": points["real"]}, resamples, "real") is None

    def test_best_real_arm_is_chosen_by_the_rules_metric_on_val_and_is_never_synthetic(self):
        def arm(name: str, **val: float) -> ClassifierReport:
            facts = {"model": "m", "resolution": 32, "labels": ["a"], "n_train": {}, "n_val": 1, "batch_size": 1}
            return ClassifierReport(status="trained", arm=name, val=val, **facts)

        reports = {
            "real": arm("real", balanced_accuracy=0.5, accuracy=0.9),
            "real+weights": arm("real+weights", balanced_accuracy=0.6, accuracy=0.8),
            "real+balanced-sampling": arm("real+balanced-sampling", balanced_accuracy=0.6, accuracy=0.7),
            "real+synthetic": arm("real+synthetic", balanced_accuracy=0.9, accuracy=0.95),
        }
        assert choose_best_real(reports, ReleaseConfig()) == "real+weights"
        assert choose_best_real(reports, ReleaseConfig(metric="accuracy")) == "real"
        with pytest.raises(CheckpointError, match="no arm on real images"):
            choose_best_real({"real+synthetic": reports["real+synthetic"]}, ReleaseConfig())


@pytest.fixture(scope="module")
def arms(squares, tmp_path_factory):
    out = tmp_path_factory.mktemp("arms")
    for arm in ARMS:
        train(squares, out / arm, arm, steps=12)
    return {arm: out / arm for arm in ARMS}


class TestEvaluate:
    config = ClassifierConfig(model="test_resnet", resolution=32)
    release = ReleaseConfig(bootstrap_samples=200)

    def evaluate(self, squares, arms, out):
        return evaluate(squares, squares / "manifest.csv", arms, out, self.config, self.release, 0, "cpu", None)

    def test_report_agrees_with_the_predictions_it_leaves(self, squares, arms, tmp_path):
        report = self.evaluate(squares, arms, tmp_path)
        assert read_report(tmp_path / "report.json", EvaluationReport) == report
        table = pd.read_csv(tmp_path / "predictions.csv")
        assert list(table.columns) == ["image_id", "label", "group", "arm", "p_blue", "p_green", "p_red"]
        assert list(table["arm"].unique()) == list(ARMS)
        for result in report.arms:
            rows = table[table["arm"] == result.arm]
            probabilities = rows[["p_blue", "p_green", "p_red"]].to_numpy()
            assert probabilities.sum(1) == pytest.approx(np.ones(len(rows)))
            predicted = np.array(report.labels)[probabilities.argmax(1)]
            balanced = metrics.balanced_accuracy_score(rows["label"], predicted)
            assert result.test["balanced_accuracy"].value == pytest.approx(balanced)
            assert result.confusion == metrics.confusion_matrix(rows["label"], predicted).tolist()
            assert all(e.low - 1e-9 <= e.value <= e.high + 1e-9 for e in (result.test["accuracy"],))
            assert result.roc["red"].true_positive_rate[-1] == 1
        values = {result.arm: result.test["accuracy"].value for result in report.arms}
        difference = values["real+synthetic"] - values[report.release.best_real_arm]
        assert report.differences["accuracy"].value == pytest.approx(difference)
        assert report.n_test == {"blue": 10, "green": 4, "red": 2}
        assert report.n_groups == 8

    def test_samples_show_what_the_shipped_arm_says(self, squares, arms, tmp_path):
        report = self.evaluate(squares, arms, tmp_path)
        table = pd.read_csv(tmp_path / "predictions.csv")
        shipped = table[table["arm"] == report.release.arm].set_index("image_id")
        assert len(report.samples) == 4 + 4 + 2
        for sample in report.samples:
            assert (squares / sample.path).is_file()
            row = shipped.loc[sample.image_id]
            assert row["label"] == sample.label
            assert row[f"p_{sample.predicted}"] == pytest.approx(sample.confidence)
            assert sample.confidence == pytest.approx(row[["p_blue", "p_green", "p_red"]].max())

    def test_the_choice_reads_val_only(self, squares, arms, tmp_path):
        """With the test labels permuted the same real arm is chosen."""
        manifest = pd.read_csv(squares / "manifest.csv")
        test = manifest["split"] == "test"
        manifest.loc[test, "label"] = np.roll(manifest.loc[test, "label"], 5)
        manifest.to_csv(tmp_path / "manifest.csv", index=False)
        whole = self.evaluate(squares, arms, tmp_path / "a")
        permuted = evaluate(
            squares, tmp_path / "manifest.csv", arms, tmp_path / "b", self.config, self.release, 0, "cpu", None
        )
        assert permuted.release.best_real_arm == whole.release.best_real_arm
        assert permuted.arms[0].val == whole.arms[0].val
        assert permuted.arms[0].test != whole.arms[0].test

    def test_equal_inputs_give_equal_bytes(self, squares, arms, tmp_path):
        self.evaluate(squares, arms, tmp_path / "a")
        self.evaluate(squares, arms, tmp_path / "b")
        for name in ("report.json", "predictions.csv"):
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()

    def test_skipped_arm_is_named_with_its_reason(self, squares, arms, tmp_path):
        train(squares, tmp_path / "skipped", "real+synthetic", "none.csv")
        report = self.evaluate(squares, {**arms, "real+synthetic": tmp_path / "skipped"}, tmp_path / "out")
        skipped = next(result for result in report.arms if result.arm == "real+synthetic")
        assert skipped == ArmResult(arm="real+synthetic", status="skipped", reason=skipped.reason, val={})
        assert report.release.decision == "rejected"
        assert report.release.arm == report.release.best_real_arm
        assert skipped.reason in " ".join(report.release.reasons)
        assert json.loads((tmp_path / "out" / "report.json").read_text())["differences"] == {}

    def test_missing_arm_and_empty_test_split_are_one_sentence(self, squares, arms, tmp_path):
        with pytest.raises(CheckpointError, match="run the stage"):
            self.evaluate(squares, {**arms, "real": tmp_path / "nowhere"}, tmp_path)
        manifest = pd.read_csv(squares / "manifest.csv")
        manifest[manifest["split"] != "test"].to_csv(tmp_path / "manifest.csv", index=False)
        with pytest.raises(DataError, match="no test images"):
            evaluate(squares, tmp_path / "manifest.csv", arms, tmp_path, self.config, self.release, 0, "cpu", None)
