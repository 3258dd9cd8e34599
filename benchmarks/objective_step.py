"""What BSR and MetaRM cost beside a plain Bradley-Terry step, in one run.

    python benchmarks/objective_step.py

The same model and pairs; the meta steps add as many sequences of shifted completions as
there are in the pairs (16 pairs, 8 prompts with 4 completions each, lengths as in
reward_step.py). All take turns step by step, in another order each round; medians and
their ratios.
"""

import argparse
import json
import statistics
import time
from typing import Any

import jax
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

from rlhf_jax.algorithms.meta_reward import meta_objective, spread_objective
from rlhf_jax.algorithms.reward_model import reward_apply, reward_objective
from rlhf_jax.algorithms.update import init_state, make_update
from rlhf_jax.data.encoded import EncodedPair
from rlhf_jax.data.kwise import EncodedKwise, pack_kwise
from rlhf_jax.data.layout import pack_pairs
from rlhf_jax.losses.regularizers import batch_sum_to_zero
from rlhf_jax.models.heads import RewardModel, init_head_model
from rlhf_jax.models.presets import PRESETS
from rlhf_jax.types import MetaBatch

PAIRS, PROMPTS, SAMPLES = 16, 8, 4


def lengths(rng: np.random.Generator) -> int:
    """20-200 tokens, lognormal."""
    return int(np.clip(rng.lognormal(np.log(75.0), 0.6), 20, 200))


def make_batch(vocab_size: int, seed: int) -> MetaBatch:
    """Random ids: pairs, and shifted completions, as many sequences of each."""
    rng = np.random.default_rng(seed)

    def ids() -> list[int]:
        return rng.integers(2, vocab_size, lengths(rng)).tolist()

    pairs = [EncodedPair(ids(), ids(), ids()) for _ in range(PAIRS)]
    groups = [
        EncodedKwise(ids(), [ids() for _ in range(SAMPLES)]) for _ in range(PROMPTS)
    ]
    return MetaBatch(
        pairs=pack_pairs(pairs, row_length=1024),
        shifted=pack_kwise(groups, num_completions=SAMPLES, row_length=1024),
    )


def measure(name: str, rounds: int, seed: int) -> dict[str, Any]:
    """Medians and ratios of one model shape."""
    config = PRESETS[name]
    model = RewardModel(config)
    apply = reward_apply(model, deterministic=True)
    outer, inner = reward_objective(apply), spread_objective(apply)

    def meta(second_order: bool) -> Any:
        return meta_objective(
            inner,
            outer,
            split=lambda params: (params, {}),
            inner_lr=1e-2,
            normalise=True,
            second_order=second_order,
        )

    bsr = reward_objective(apply, regularizers=[(batch_sum_to_zero, 1e-3)])
    objectives = {
        "plain": lambda params, batch, key: outer(params, batch.pairs, key),
        "BSR": lambda params, batch, key: bsr(params, batch.pairs, key),
        "first order": meta(False),
        "second order": meta(True),
    }
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-5))
    params = init_head_model(model, jax.random.key(seed))
    batch = jax.device_put(make_batch(config.vocab_size, seed))
    updates, states, memory = {}, {}, {}
    key = jax.random.key(seed)
    for side, objective in objectives.items():
        states[side] = init_state(jax.tree.map(jax.numpy.copy, params), tx)
        update = jax.jit(make_update(objective, tx), donate_argnums=0)
        updates[side] = update.lower(states[side], batch, key).compile()
        found = updates[side].memory_analysis()
        memory[side] = getattr(found, "temp_size_in_bytes", 0)
    seconds: dict[str, list[float]] = {side: [] for side in objectives}
    order = np.random.default_rng(seed)
    for _ in range(rounds + 1):
        # In random order: the step after the second order's takes its memory anew.
        for side in order.permutation(list(updates)).tolist():
            start = time.perf_counter()
            states[side], metrics = updates[side](states[side], batch, key)
            jax.block_until_ready((states[side], metrics))
            seconds[side].append(time.perf_counter() - start)
    medians = {side: statistics.median(s[1:]) for side, s in seconds.items()}
    return {
        "shape": name,
        "rounds": rounds,
        "seed": seed,
        "device": str(jax.devices()[0]),
        "rows": {
            "pairs": list(batch.pairs.sequences.tokens.shape),
            "shifted": list(batch.shifted.sequences.tokens.shape),
        },
        "step_s": medians,
        "ratio": {side: value / medians["plain"] for side, value in medians.items()},
        "temporaries_mb": {side: size / 1e6 for side, size in memory.items()},
    }


def show(report: dict[str, Any]) -> None:
    table = Table(title=f"{report['shape']}: median of {report['rounds']} steps")
    for name in ("step", "s", "beside plain", "temporaries MB"):
        table.add_column(name, justify="left" if name == "step" else "right")
    for side, seconds in report["step_s"].items():
        table.add_row(
            side,
            f"{seconds:.3f}",
            f"{report['ratio'][side]:.2f}x",
            f"{report['temporaries_mb'][side]:.0f}",
        )
    Console(width=100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=PRESETS, default="small-5m")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    report = measure(args.shape, args.rounds, args.seed)
    show(report)
    print(json.dumps(report))


main()
