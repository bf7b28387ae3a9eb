"""The class gate: a pure function from reports and limits to decisions.

How the limits of `GateConfig` were calibrated, on the sample data (32 x 32) and on HAM10000's classes cut
to 40-150 reals, with sets of images whose worth is known (tests/test_gate.py repeats the former):

- FD, KID ratio <= 0.5: nearer to the own class than half-way to the nearest other one. Unseen reals lie about 0. The
  standard errors behind the bounds agree with the scatter over independent samples (100 reals of nv against bkl: FD 0.9
  against 0.9, KID 0.035 against 0.025). Classes that lie close together need more reals before this can be settled.
- Coverage ratio >= 0.6 of what unseen reals reach. These have lower bounds of 0.7 to 0.9; generators that show a few
  faces of a class have 0.2 to 0.4.
- Recall ratio >= 0.4, the share of reals within reach of the fakes: of unseen reals about 1; fakes of half the reals'
  scatter, which coverage does not notice, have under 0.25.
- Atypical share <= 10 %: of the images drawn those that the sieve takes out, which bundles ship without. Of reals about
  1 % are such where train images are many, 3 % with 40, 7 % with 14 (at most 19 % at 95 %; up to there nothing is
  rejected); under 2 % of trained generators' images. Every other figure is of the images that were kept, and calls a
  generator good of which three images in five are inverted.
- Near-copy distance 0.5: 96 to 100 % of training images that were turned, mirrored, shifted by fractions of up to
  2 of 32 pixels, recoloured and noised lie under it, and 0 to 0.7 % of unseen reals.
- Near-copy share <= 2.5 %: with 230 or more synthetic images one jittered copy in twenty is rejected, and unseen reals
  are accepted. With fewer than 150 images even none in all leaves the share unsettled: see `synthesis.min_images`.
- Share nearer than unseen reals <= 0.7: of the pairs of a synthetic image and an unseen real. It sees wholesale
  copying: 1 of copies alone, 0.65 to 0.76 of images mixed from 0.6 of a jittered train image and 0.4 of a drawn one;
  one copy in twenty moves it by 0.03. Generators that copy nothing have 0.35 to 0.58.
"""

from collections.abc import Sequence
from math import ceil
from typing import Literal

from raresynth.config import GateConfig
from raresynth.lineage import Report
from raresynth.quality.distances import Z_95
from raresynth.quality.reports import Atypical, Copying, FailedClass, QualityReport

Verdict = Literal["accepted", "rejected", "insufficient"]
REALS = {"val": "unseen reals", "train": "train images are to one another"}
"""What near copies are held against, in words."""
MIN_COPIES_FOUND = 0.8
"""One jittered copy in twenty, the least that is to be noticed, then stands out from the limit of 2.5 %."""


class ClassDecision(Report):
    """What may be done with a class's synthetic images, and why."""

    label: str
    decision: Verdict
    reasons: list[str]


def decide(reports: Sequence[QualityReport | FailedClass], config: GateConfig) -> dict[str, ClassDecision]:
    """Decide on every class.

    A class is accepted if every figure's 95 % interval lies on the right side of its limit, rejected if some
    figure's interval lies entirely on the wrong side, and insufficient otherwise: more images would tell.
    """
    return {report.label: _decide_class(report, config) for report in reports}


def _decide_class(report: QualityReport | FailedClass, config: GateConfig) -> ClassDecision:
    if isinstance(report, FailedClass):
        return ClassDecision(label=report.label, decision="rejected", reasons=[report.reason])
    copying = report.copying
    judged = [
        _at_most("FD ratio", report.fd.ratio, report.fd.ratio_low, report.fd.ratio_high, config.fd_ratio),
        _at_most("KID ratio", report.kid.ratio, report.kid.ratio_low, report.kid.ratio_high, config.kid_ratio),
        _at_least(
            "coverage ratio",
            report.coverage.ratio,
            report.coverage.ratio_low,
            report.coverage.ratio_high,
            config.coverage_ratio,
        ),
        _at_least(
            "recall ratio", report.recall.ratio, report.recall.ratio_low, report.recall.ratio_high, config.recall_ratio
        ),
        _atypical(report.atypical, config.atypical_share),
        _near_copies(copying, config.near_copy_share),
        _at_most(
            f"share nearer than {REALS[copying.reals]}",
            copying.nearer_share,
            copying.nearer_low,
            copying.nearer_high,
            config.nearer_share,
        ),
    ]
    verdicts = {verdict for verdict, _ in judged}
    open_questions = "insufficient" in verdicts or report.doubts
    decision: Verdict = "rejected" if "rejected" in verdicts else "insufficient" if open_questions else "accepted"
    reasons = [*(text for _, text in judged), *report.doubts, *report.notes]
    return ClassDecision(label=report.label, decision=decision, reasons=reasons)


def _atypical(atypical: Atypical, limit: float) -> tuple[Verdict, str]:
    """A share that reals themselves may have, since so few of them tell what is typical, rejects nothing."""
    verdict, text = _at_most("atypical share", atypical.share, atypical.low, atypical.high, limit)
    if verdict == "rejected" and atypical.low <= atypical.reals_at_most:
        most = f"{100 * atypical.reals_at_most:.0f} %"
        return "insufficient", f"{text}, but with so few train images up to {most} of reals count as atypical too"
    return verdict, text


def _near_copies(copying: Copying, limit: float) -> tuple[Verdict, str]:
    """The check is believed as far as its own controls carry it."""
    verdict, text = _at_most("near-copy share", copying.near_copy_share, copying.low, copying.high, limit)
    found, reals = copying.controls.copies_found, copying.controls.reals_found
    if verdict == "accepted" and found < MIN_COPIES_FOUND:
        return "insufficient", f"{text}, but of jittered train images too only {100 * found:.0f} % count as copies"
    if verdict == "rejected" and reals > limit:
        which = "reals that it never saw" if copying.reals == "val" else "train images, held against one another,"
        return "insufficient", f"{text}, but of {which} {100 * reals:.1f} % count as copies too"
    least = ceil(Z_95**2 * (1 - limit) / limit) if limit else 0  # Wilson's upper bound of 0 in so many is the limit
    if verdict == "insufficient" and copying.n_drawn < least:
        return verdict, f"{text}; it takes {least} (synthesis.min_images asks for more)"
    return verdict, text


def _at_most(
    name: str, value: float | None, low: float | None, high: float | None, limit: float
) -> tuple[Verdict, str]:
    if value is None or low is None or high is None:
        text = f"{name} cannot be told: the nearest other class is not clearly apart; more reals would tell"
        return "insufficient", text
    verdict: Verdict = "accepted" if high <= limit else "rejected" if low > limit else "insufficient"
    return verdict, _sentence(name, value, low, high, f"at most {limit:g}", verdict)


def _at_least(
    name: str, value: float | None, low: float | None, high: float | None, limit: float
) -> tuple[Verdict, str]:
    if value is None or low is None or high is None:
        return "insufficient", f"{name} cannot be told from so few reals; more reals would tell"
    verdict: Verdict = "accepted" if low >= limit else "rejected" if high < limit else "insufficient"
    return verdict, _sentence(name, value, low, high, f"at least {limit:g}", verdict)


def _sentence(name: str, value: float, low: float, high: float, limit: str, verdict: Verdict) -> str:
    meaning = {"accepted": "met", "rejected": "missed", "insufficient": "not settled by so few images"}[verdict]
    interval = f" (95 % interval {low:.3g} to {high:.3g})" if low != high else ""
    return f"{name} {value:.3g}{interval}, limit {limit}: {meaning}"
