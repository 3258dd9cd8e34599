"""Reward-model training step beside TRL: same weights, same pairs, same batches.

    make bench                                  # both shapes
    python benchmarks/reward_step.py --shape smollm2-135m --rounds 3

One run, one machine: TRL lives in a process of its own (trl_worker.py) and the two
sides take turns step by step, so that a busy moment hits both. A step is everything
from the list of token ids to the updated parameters: collation or packing, forward,
backward, clipping, AdamW, in float32. Medians are printed as a table and, for scripts,
as one JSON line. A "real" token is one that TRL attends to (prompt + completion,
counted for chosen and rejected): the same number on both sides, whatever a layout pads
or shares.
"""

import argparse
import dataclasses
import json
import pathlib
import platform
import statistics
import tempfile
import time
from typing import Any

import jax
import numpy as np
import optax
from peer import Peer, require_peer
from rich.console import Console
from rich.table import Table

from rlhf_jax.algorithms.reward_model import reward_objective
from rlhf_jax.algorithms.update import init_state, make_evaluate, make_update
from rlhf_jax.data.encoded import EncodedPair
from rlhf_jax.data.layout import pack_pairs
from rlhf_jax.io.peak import measured_flops
from rlhf_jax.models.config import ComputeConfig, LlamaConfig
from rlhf_jax.models.flops import train_flops
from rlhf_jax.models.heads import RewardModel, init_head_model
from rlhf_jax.models.hf import export_hf
from rlhf_jax.models.parameters import unrolled
from rlhf_jax.models.presets import PRESETS
from rlhf_jax.types import PreferenceBatch

LEARNING_RATE = 1e-5
BATCH_SIZES = {"small-5m": 16, "smollm2-135m": 4}
ROW_LENGTH = {"padded": 400, "packed": 400, "shared": 600}


def sample_pairs(count: int, vocab_size: int, seed: int) -> list[EncodedPair]:
    """Pairs of random ids; prompts and completions of 20-200 tokens, lognormal."""
    rng = np.random.default_rng(seed)

    def ids() -> list[int]:
        length = int(np.clip(rng.lognormal(np.log(75.0), 0.6), 20, 200))
        return rng.integers(2, vocab_size, length).tolist()

    return [
        EncodedPair(prompt=ids(), chosen=ids(), rejected=ids(), where=f"pair {i}")
        for i in range(count)
    ]


def sequence_lengths(pairs: list[EncodedPair]) -> np.ndarray:
    """Lengths of all 2 x pairs sequences prompt + completion."""
    return np.array(
        [len(p.prompt) + len(c) for p in pairs for c in (p.chosen, p.rejected)]
    )


def shape(batch: PreferenceBatch) -> tuple[int, ...]:
    """What a compiled update depends on: rows, row length, score slots."""
    return (*batch.sequences.tokens.shape, *batch.score_at.shape)


class Ours:
    """Steps of one layout of rlhf_jax, from the same initial parameters."""

    def __init__(
        self, config: LlamaConfig, params: Any, layout: str, scan_layers: bool
    ) -> None:
        model = RewardModel(config, ComputeConfig(scan_layers=scan_layers))
        params = params if scan_layers else unrolled(params)

        def apply(params: Any, sequences: Any, score_at: Any, key: Any) -> jax.Array:
            return model.apply({"params": params}, sequences, score_at)

        tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(LEARNING_RATE))
        objective = reward_objective(apply)
        self.layout = layout
        self.state = init_state(jax.tree.map(jax.numpy.copy, params), tx)
        self.update = jax.jit(make_update(objective, tx), donate_argnums=0)
        self.compiled: dict[tuple[int, ...], Any] = {}
        self.evaluate = jax.jit(make_evaluate(objective))
        self.key = jax.random.key(0)

    def pack(self, pairs: list[EncodedPair]) -> PreferenceBatch:
        return pack_pairs(pairs, layout=self.layout, row_length=ROW_LENGTH[self.layout])

    def compile(self, batches: list[list[EncodedPair]]) -> float:
        """Seconds to compile the update for every shape that these batches have."""
        start = time.perf_counter()
        for packed in map(self.pack, batches):
            if shape(packed) not in self.compiled:
                lowered = self.update.lower(self.state, packed, self.key)
                self.compiled[shape(packed)] = lowered.compile()
        return time.perf_counter() - start

    def step(self, pairs: list[EncodedPair]) -> float:
        """Seconds of one step, packing included."""
        start = time.perf_counter()
        packed = self.pack(pairs)
        update = self.compiled[shape(packed)]
        self.state, metrics = update(self.state, packed, self.key)
        jax.block_until_ready((self.state, metrics))
        return time.perf_counter() - start

    def loss(self, pairs: list[EncodedPair]) -> float:
        return float(self.evaluate(self.state, self.pack(pairs))["loss"].value())


def measure(
    name: str, layouts: list[str], rounds: int, seed: int, scan_layers: bool
) -> dict[str, Any]:
    """All figures of one model shape."""
    config, batch_size = PRESETS[name], BATCH_SIZES[name]
    pairs = sample_pairs(batch_size * (rounds + 1), config.vocab_size, seed)
    batches = [pairs[i : i + batch_size] for i in range(0, len(pairs), batch_size)]
    params = init_head_model(RewardModel(config), jax.random.key(seed))
    with tempfile.TemporaryDirectory() as scratch:
        directory = pathlib.Path(scratch)
        export_hf(directory / "model", config, params, kind="reward")
        job = {
            "model": str(directory / "model"),
            "out": str(directory / "trl"),
            "pairs": [dataclasses.asdict(pair) for pair in pairs],
            "batch_size": batch_size,
            "steps": len(batches),
            "learning_rate": LEARNING_RATE,
        }
        trl = Peer("trl_worker.py", job, directory)
        ceiling = {"torch": trl.hello["ceiling"], "xla": measured_flops(2048)}
        ours = {layout: Ours(config, params, layout, scan_layers) for layout in layouts}
        del params
        compile_s = {layout: side.compile(batches) for layout, side in ours.items()}
        first = {"trl": trl.hello["loss"]}
        first |= {layout: side.loss(batches[0]) for layout, side in ours.items()}
        seconds: dict[str, list[float]] = {side: [] for side in ("trl", *layouts)}
        for batch in batches:
            seconds["trl"].append(trl.ask()["seconds"])
            for layout, side in ours.items():
                seconds[layout].append(side.step(batch))
        bye = trl.finish()
        last = {"trl": bye["loss"]}
        last |= {layout: side.loss(batches[0]) for layout, side in ours.items()}
    # The first round warms both sides up.
    timed = {side: values[1:] for side, values in seconds.items()}
    ceiling["torch"] = max(ceiling["torch"], bye["ceiling"])
    ceiling["xla"] = max(ceiling["xla"], measured_flops(2048))
    rows = {
        side: summarise(values, batches[1:], config, ours.get(side), ceiling)
        for side, values in timed.items()
    }
    for layout in layouts:
        rows[layout]["compile_s"] = compile_s[layout]
        rows[layout]["shapes"] = len(ours[layout].compiled)
    return {
        "shape": name,
        "pairs": batch_size,
        "rounds": rounds,
        "scan_layers": scan_layers,
        "seed": seed,
        "machine": f"{platform.machine()}, {trl.hello['threads']} threads",
        "versions": {"jax": jax.__version__, "trl": "1.16"},
        "ceiling_gflops": {by: value / 1e9 for by, value in ceiling.items()},
        "loss_first_batch": {"before": first, "after": last},
        "results": rows,
    }


def summarise(
    seconds: list[float],
    batches: list[list[EncodedPair]],
    config: LlamaConfig,
    side: Ours | None,
    ceiling: dict[str, float],
) -> dict[str, float]:
    """Medians over the timed steps of one side."""
    pairs_s, real_s, padding, fraction = [], [], [], []
    for took, batch in zip(seconds, batches, strict=True):
        lengths = sequence_lengths(batch)
        if side is None:
            filled, columns = int(lengths.sum()), len(lengths) * int(lengths.max())
        else:
            segment = side.pack(batch).sequences.segment
            filled, columns = int(np.sum(segment != 0)), segment.size
        visible = float(np.sum(lengths * (lengths + 1) / 2))
        flops = train_flops(config, tokens=columns, visible=visible)
        pairs_s.append(len(batch) / took)
        real_s.append(lengths.sum() / took)
        padding.append(1 - filled / columns)
        fraction.append(flops / took / ceiling["torch" if side is None else "xla"])
    return {
        "step_s": statistics.median(seconds),
        "step_s_min": min(seconds),
        "pairs_per_s": statistics.median(pairs_s),
        "real_tokens_per_s": statistics.median(real_s),
        "padding": statistics.median(padding),
        "fraction_of_ceiling": statistics.median(fraction),
    }


def show(report: dict[str, Any], console: Console) -> None:
    """The report as a table, losses and ceilings under it."""
    table = Table(
        title=f"{report['shape']}: {report['pairs']} pairs a step, float32, "
        f"median of {report['rounds']} steps"
    )
    for column in (
        "side",
        "s/step",
        "pairs/s",
        "real tokens/s",
        "padding",
        "of ceiling",
        "beside TRL",
        "compile s (shapes)",
    ):
        table.add_column(column, justify="left" if column == "side" else "right")
    trl = report["results"]["trl"]
    for name, row in report["results"].items():
        table.add_row(
            "TRL 1.16" if name == "trl" else f"rlhf_jax {name}",
            f"{row['step_s']:.2f}",
            f"{row['pairs_per_s']:.2f}",
            f"{row['real_tokens_per_s']:,.0f}",
            f"{row['padding']:.0%}",
            f"{row['fraction_of_ceiling']:.0%}",
            f"{row['pairs_per_s'] / trl['pairs_per_s']:.2f}x",
            f"{row['compile_s']:.0f} ({row['shapes']})" if "shapes" in row else "",
        )
    console.print(table)
    ceilings = report["ceiling_gflops"]
    console.print(
        f"float32 matmul ceiling: torch {ceilings['torch']:.0f} GFLOP/s, "
        f"XLA {ceilings['xla']:.0f} GFLOP/s ({report['machine']})"
    )
    for when, losses in report["loss_first_batch"].items():
        text = ", ".join(f"{name} {loss:.6f}" for name, loss in losses.items())
        console.print(f"loss on the first batch {when} training: {text}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=BATCH_SIZES, action="append")
    parser.add_argument("--layout", choices=ROW_LENGTH, action="append")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--unrolled", action="store_true", help="compile every layer instead of a scan"
    )
    args = parser.parse_args()
    require_peer()
    layouts = args.layout or list(ROW_LENGTH)
    for name in args.shape or BATCH_SIZES:
        report = measure(name, layouts, args.rounds, args.seed, not args.unrolled)
        show(report, Console(width=110))
        print(json.dumps(report))


main()
