"""The peer's end: requests on stdin, answers on what was stdout, one JSON line each.

Import it first: from then on whatever the peer's libraries print goes to stderr. Runs
in benchmarks/.envs/trl (see envs.sh), imports nothing of rlhf_jax.
"""

import json
import sys
import time
from typing import Any

ANSWERS, sys.stdout = sys.stdout, sys.stderr

import torch  # noqa: E402


def job() -> dict[str, Any]:
    """What the driver wrote for this process."""
    with open(sys.argv[1]) as file:
        return json.load(file)


def answer(**values: Any) -> None:
    """Writes one JSON line to the driver."""
    print(json.dumps(values), file=ANSWERS, flush=True)


def wait() -> dict[str, Any]:
    """The next request; {} at the end."""
    line = sys.stdin.readline()
    return json.loads(line) if line.strip() else {}


def measured_flops(size: int = 2048, repeats: int = 5) -> float:
    """Best FLOP/s of a square float32 matmul."""
    x = torch.ones(size, size)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        x @ x
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best
