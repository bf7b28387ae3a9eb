"""Requests through a cluster's Service while its pods come and go: each is sent once, and counted by its answer.

    python -m benchmarks.rollout --url http://CLUSTER_IP:3000 --key KEY --image FILE [--fresh]

Run where the Service's address is reached, a node or a pod, and meanwhile switch bundles, restart, drain. Every fourth
client asks /generate for 16 images, the others /predict. The key's rate must allow it (`requests_per_minute`, `burst`).
"""

import argparse
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import numpy as np

GENERATE_EVERY, N_SYNTHETIC = 4, 16


class Asker(threading.Thread):
    """One client, who asks again as soon as there is an answer."""

    def __init__(self, client: httpx.Client, image: bytes, label: str | None, until: float) -> None:
        super().__init__()
        self.client, self.image, self.label, self.until = client, image, label, until
        self.outcomes: Counter[str] = Counter()
        """By status, or by the name of the exception where no answer came."""
        self.bundles: Counter[str] = Counter()
        self.seconds: list[float] = []

    def run(self) -> None:
        while time.monotonic() < self.until:
            began = time.monotonic()
            try:
                answer = self._ask()
            except httpx.HTTPError as error:
                self.outcomes[type(error).__name__] += 1
                continue
            self.seconds.append(time.monotonic() - began)
            self.outcomes[str(answer.status_code)] += 1
            if self.label is None and answer.is_success:
                self.bundles[answer.json()["versions"]["bundle"][:8]] += 1

    def _ask(self) -> httpx.Response:
        if self.label is None:
            return self.client.post("/predict", files={"image": ("a.jpg", self.image)})
        return self.client.post("/generate", json={"label": self.label, "n": N_SYNTHETIC, "seed": 0})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--key", required=True)
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--fresh", action="store_true", help="a connection a request")
    args = parser.parse_args()
    headers = {"Authorization": f"Bearer {args.key}"} | ({"Connection": "close"} if args.fresh else {})
    clients = [httpx.Client(base_url=args.url, headers=headers, timeout=60) for _ in range(args.clients)]
    label = next(iter(clients[0].get("/model").raise_for_status().json()["generators"]))
    image, until = args.image.read_bytes(), time.monotonic() + args.seconds
    askers = [
        Asker(client, image, label if i % GENERATE_EVERY == GENERATE_EVERY - 1 else None, until)
        for i, client in enumerate(clients)
    ]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    outcomes: Counter[str] = sum((asker.outcomes for asker in askers), Counter())
    bundles: Counter[str] = sum((asker.bundles for asker in askers), Counter())
    p50, p99, most = 1000 * np.quantile([s for asker in askers for s in asker.seconds], (0.5, 0.99, 1.0))
    print(f"answers {dict(outcomes)}; p50 {p50:.0f} ms, p99 {p99:.0f} ms, most {most:.0f} ms")
    print(f"predictions by bundle {dict(bundles)}")


if __name__ == "__main__":
    main()
