"""M reward models on the testbed: all at once (vmap) against one after the other.

    python benchmarks/members.py --members 8 --steps 30

Each side runs in a process of its own, so that its peak memory is its own; wall times
leave compilation out (a first call of one step).
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import jax
from rich.console import Console
from rich.table import Table

from rlhf_jax.algorithms.optimizer import (
    OptimizerConfig,
    make_optimizer,
    make_schedule,
)
from rlhf_jax.algorithms.reward_model import reward_apply, reward_objective
from rlhf_jax.data.iterate import Batches
from rlhf_jax.data.prepare import make_encoder
from rlhf_jax.data.store import PairDataset
from rlhf_jax.models.config import ComputeConfig
from rlhf_jax.models.heads import RewardModel, init_head_model
from rlhf_jax.models.presets import PRESETS
from rlhf_jax.programs.members import make_trainer
from rlhf_jax.testbed.rows import rows
from rlhf_jax.testbed.tokenizer import testbed_tokenizer

BATCH_SIZE = 64


def one_side(at_once: bool, members: int, steps: int) -> dict[str, float]:
    """Seconds and peak memory of training all members."""
    model = RewardModel(PRESETS["testbed"], ComputeConfig(scan_layers=False))
    encoder = make_encoder(testbed_tokenizer())
    dataset = PairDataset.of(
        encoder.pair(row["prompt"], row["chosen"], row["rejected"])
        for row in rows("train", size=2000)
    )
    config = OptimizerConfig(learning_rate=1e-3)
    tx = make_optimizer(config, make_schedule(config, steps))
    objective = reward_objective(reward_apply(model, deterministic=True))
    train = make_trainer(objective, tx, at_once=at_once)
    params = [init_head_model(model, jax.random.key(0))] * members
    options = {
        "seeds": list(range(members)),
        "batch_size": BATCH_SIZE,
        "shapes": Batches(dataset, BATCH_SIZE, num_shapes=1).shapes,
    }
    jax.block_until_ready(train(params, [dataset] * members, steps=1, **options))
    start = time.perf_counter()
    jax.block_until_ready(train(params, [dataset] * members, steps=steps, **options))
    return {
        "seconds": time.perf_counter() - start,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=("at once", "one by one"))
    args = parser.parse_args()
    if args.side:
        print(json.dumps(one_side(args.side == "at once", args.members, args.steps)))
        return
    found: dict[str, list[dict[str, float]]] = {"at once": [], "one by one": []}
    for _ in range(args.rounds):
        for side, results in found.items():
            command = [sys.executable, __file__, "--side", side]
            command += ["--members", str(args.members), "--steps", str(args.steps)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            results.append(json.loads(done.stdout.splitlines()[-1]))
    table = Table(title=f"{args.members} members, {args.steps} steps of {BATCH_SIZE}")
    for name in ("side", "s", "peak MB"):
        table.add_column(name, justify="left" if name == "side" else "right")
    medians = {
        side: {
            key: sorted(r[key] for r in results)[len(results) // 2]
            for key in results[0]
        }
        for side, results in found.items()
    }
    for side, figures in medians.items():
        table.add_row(side, f"{figures['seconds']:.1f}", f"{figures['peak_mb']:.0f}")
    Console(width=80).print(table)
    print(json.dumps({"members": args.members, "steps": args.steps, **medians}))


main()
