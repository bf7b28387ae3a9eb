"""The class gate: a pure function from reports and limits to decisions.

How the limits of `GateConfig` were calibrated, on the sample data (32 x 32) and on HAM10000's classes cut
to 40-150 reals, with sets of images whose worth is known (tests/test_gate.py repeats the former):

- FD, KID ratio <= 0.5: nearer to the own class than half-way to the nearest other one. Unseen reals lie about 0. The
  standard errors behind the bounds agree with the scatter over independent samples (100 reals of nv against bkl: FD 0.9
  against 0.9, KID 0.035 against 0.025). Classes that lie close together need more reals before this can be settled.
- Coverage ratio >= 0.6 of what unseen reals reach. These have lower bounds of 0.7 to 0.9; generators that show a few
  faces of a class have 0.2 to 0.4.
- Near-copy distance 0.5: 96 to 100 % of training images that were turned, mirrored, shifted by fractions of up to
  2 of 32 pixels, recoloured and noised lie under it, and 0 to 0.7 % of unseen reals.
- Near-copy share <= 2.5 %: with 230 or more synthetic images one jittered copy in twenty is rejected, and unseen reals
  are accepted. With fewer than 150 images even none in all leaves the share unsettled.
- C_T > -3, the customary three standard errors. It sees wholesale copying; one copy in twenty moves it little.
"""

from collections.abc import Sequence
from typing import Literal

from raresynth.config import GateConfig
from raresynth.lineage import Report
from raresynth.quality.reports import FailedClass, QualityReport

Verdict = Literal["accepted", "rejected", "insufficient"]


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
        _at_most("near-copy share", copying.near_copy_share, copying.low, copying.high, config.near_copy_share),
        # C_T is measured in its own standard errors, so the limit is its interval.
        _at_least("C_T", copying.c_t, copying.c_t, copying.c_t, config.c_t),
    ]
    verdicts = {verdict for verdict, _ in judged}
    decision: Verdict = (
        "rejected" if "rejected" in verdicts else "insufficient" if "insufficient" in verdicts else "accepted"
    )
    return ClassDecision(label=report.label, decision=decision, reasons=[*(text for _, text in judged), *report.notes])


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
