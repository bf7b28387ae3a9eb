"""Ten thousand hostile requests at a running service: what it answers, and whether it lives on.

    python -m benchmarks.fuzz_serving --bundle runs/demo/bundle --out fuzz.json

Half of them are schemathesis's, from the service's OpenAPI document, in all its phases; the others come from
tests/serving_fuzz.py: mutated and heavy images, broken forms, odd JSON and what is hardly HTTP. Every answer is
checked. The same seed gives the same inputs of tests/serving_fuzz.py.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import yaml
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from serving_fuzz import everything, finding, send  # noqa: E402
from serving_process import Served, serving  # noqa: E402

KEY = "key-of-the-fuzzer"
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,"
    "response_headers_conformance,negative_data_rejection,unsupported_method,ignored_auth"
)
CONFIG = """
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", 503, 504, 507]
[checks.negative_data_rejection]
expected-statuses = [400, 401, 403, 404, 405, 413, 415, 422, 429, 503]
"""
HOOKS = """
import schemathesis

@schemathesis.hook
def filter_case(context, case):
    # An empty list is no field at all in a form, so that nothing invalid is sent.
    return not (isinstance(case.body, dict) and case.body.get("overlay") == [])
"""
TRACEBACK = re.compile(r"Traceback .*\n(?:[ \n].*\n|\n)*(\S.*)")
WARM_UP = 300


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = series(arguments.bundle, Path(folder), arguments.inputs, arguments.seed)
    arguments.out.write_text(json.dumps(found, indent=2) + "\n")
    print(table(found))
    return 1 if found["findings"] else 0


def series(bundle: Path, folder: Path, inputs: int, seed: int) -> dict[str, Any]:
    """Throw `inputs` at a service over a bundle; what it answered by kind, and everything that was wrong."""
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    (folder / "keys.yaml").write_text(
        yaml.safe_dump({"fuzzer": {"sha256": digest, "scopes": ["predict", "generate", "admin"]}})
    )
    temporary = folder / "tmp"
    temporary.mkdir()
    os.environ["TMPDIR"] = str(temporary)
    settings = {
        "bundle": bundle.resolve(),
        "keys_file": folder / "keys.yaml",
        "work_dir": folder / "work",
        "requests_per_minute": 1e9,
        "burst": 1_000_000_000,
        "body_timeout_s": 2,
    }
    began = time.perf_counter()
    log = folder / "log"
    with serving(log, **settings) as served:
        worker, label = served.worker(), next(iter(card(served)["generators"]))
        answers, findings = thrown(served, WARM_UP, seed + 1, label)
        memory = resident_mb(worker)
        left_before = files(temporary)
        answers, more = thrown(served, inputs // 2, seed, label)
        half_way = resident_mb(worker)
        specified = by_schemathesis(served, folder, inputs - inputs // 2, seed)
        findings += more + specified["findings"]
        findings += [] if served.worker() == worker else ["the worker died"]
        ready = httpx.get(f"{served.url}/readyz", timeout=10).status_code
        findings += [] if ready == 200 else [f"/readyz says {ready}"]
        findings += [f"left in the temporary folder: {name}" for name in files(temporary) - left_before]
        at_the_end = resident_mb(worker)
        findings += [f"in the log: {last}" for last in re.findall(TRACEBACK, log.read_text())]
    kinds = sorted({kind for kind, _ in answers})
    return {
        "inputs": answers.total() + specified["inputs"],
        "seconds": round(time.perf_counter() - began),
        "by_kind": {
            kind: {str(status): n for (of, status), n in sorted(answers.items()) if of == kind} for kind in kinds
        }
        | {"schemathesis": specified["by_status"]},
        "findings": findings,
        "resident_mb": {f"after {WARM_UP}": memory, "half-way": half_way, "at the end": at_the_end},
    }


def thrown(served: Served, n: int, seed: int, label: str) -> tuple[Counter[tuple[str, int]], list[str]]:
    answers: Counter[tuple[str, int]] = Counter()
    findings = []
    for number, one in enumerate(everything(seed, n, KEY, label)):
        answer = send(served.port, one)
        answers[one.kind.partition(" (")[0], answer.status] += 1
        if wrong := finding(one, answer):
            findings.append(f"{one.kind}, number {number} of seed {seed}: {wrong}")
    return answers, findings


def by_schemathesis(served: Served, folder: Path, inputs: int, seed: int) -> dict[str, Any]:
    """Runs of rising seeds until there were enough requests, which the service's own counter tells."""
    (folder / "schemathesis.toml").write_text(CONFIG)
    (folder / "fuzz_hooks.py").write_text(HOOKS)
    hooked = {**os.environ, "SCHEMATHESIS_HOOKS": "fuzz_hooks", "PYTHONPATH": str(folder)}
    before = counted(served)
    findings: list[str] = []
    while (counted(served) - before).total() < inputs:
        report = folder / "report.json"
        command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(folder / "schemathesis.toml"), "run"]
        command += [f"{served.url}/docs.json", "-H", f"Authorization: Bearer {KEY}", "--checks", CHECKS]
        command += ["--phases", "examples,coverage,fuzzing,stateful", "--max-examples", "100", "--seed", str(seed)]
        command += ["--continue-on-failure", "--generation-database", "none", "--request-timeout", "30", "--no-color"]
        command += ["--warnings", "off", "--report", "json", "--report-json-path", str(report)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=hooked)
        if done.returncode:
            findings.append(f"schemathesis, seed {seed}: {done.stdout[-3000:]}{done.stderr[-500:]}")
        seed += 1
    by_status: Counter[str] = Counter()
    for (_, status), n in (counted(served) - before).items():
        by_status[status] += n
    return {"inputs": by_status.total(), "by_status": dict(sorted(by_status.items())), "findings": findings}


def counted(served: Served) -> Counter[tuple[str, str]]:
    """Requests by path and status, as the service counts them; those for the figures themselves are left out."""
    text = httpx.get(f"{served.url}/metrics", headers={"Authorization": f"Bearer {KEY}"}, timeout=30).text
    return Counter(
        {
            (sample.labels["path"], sample.labels["status"]): int(sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == "raresynth_requests_total" and sample.labels["path"] != "/metrics"
        }
    )


def card(served: Served) -> dict[str, Any]:
    return dict(httpx.get(f"{served.url}/model", headers={"Authorization": f"Bearer {KEY}"}).json())


def resident_mb(process: int) -> int:
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def table(found: dict[str, Any]) -> str:
    rows = ["| inputs | number | answers by status (0: closed without one) |", "|---|---|---|"]
    for kind, answers in found["by_kind"].items():
        told = ", ".join(f"{status}: {n}" for status, n in answers.items())
        rows.append(f"| {kind} | {sum(answers.values())} | {told} |")
    memory = ", ".join(f"{mb} MB {when}" for when, mb in found["resident_mb"].items())
    rows += ["", f"{found['inputs']} inputs in {found['seconds']} s; findings: {len(found['findings'])}; {memory}"]
    return "\n".join([*rows, *(f"- {finding}" for finding in found["findings"])])


if __name__ == "__main__":
    sys.exit(main())
