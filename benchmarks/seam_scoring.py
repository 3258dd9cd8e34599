"""SEAM of 1,000 prompts with 30 worse completions each, beside the plain forward pass.

    python benchmarks/seam_scoring.py --policy runs/quickstart/sft \\
      --reward runs/quickstart/reward

The program `seam` scores the testbed's known corruptions in one call, compilation,
tokenising and files included. The plain pass is the same two jitted functions on full
rows of random ids, as long as the texts are on average: no padding, nothing on the
host. Medians over rounds that take turns; tokens are those of prompt and completion.
"""

import argparse
import json
import pathlib
import statistics
import tempfile
import time
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from rlhf_jax.data.texts import Texts
from rlhf_jax.programs import seam
from rlhf_jax.programs.likelihood import open_likelihood
from rlhf_jax.programs.scored_rows import read_jsonl
from rlhf_jax.programs.scorer import Scorer, ScoringConfig, open_scorer
from rlhf_jax.types import Sequences


def dense(length: int, rows: int, vocab_size: int) -> tuple[Sequences, np.ndarray]:
    """Full rows of one sequence each, and the last column of each."""
    rng = np.random.default_rng(0)
    shape = (rows, length)
    mask = np.zeros(shape, bool)
    mask[:, length // 2 :] = True
    sequences = Sequences(
        tokens=rng.integers(4, vocab_size, shape).astype(np.int32),
        positions=np.broadcast_to(np.arange(length, dtype=np.int32), shape).copy(),
        segment=np.ones(shape, np.int32),
        completion_mask=mask,
    )
    return sequences, np.full((rows, 1), length - 1, np.int32)


def plain_rate(scorers: list[Scorer], batch: Any, calls: int) -> float:
    """Tokens a second through all scorers, after a first call that compiles."""
    for scorer in scorers:
        with jax.set_mesh(scorer.mesh):
            jax.block_until_ready(scorer.score_fn(*batch))
    start = time.perf_counter()
    for scorer in scorers:
        with jax.set_mesh(scorer.mesh):
            for _ in range(calls):
                jax.block_until_ready(scorer.score_fn(*batch))
    return calls * batch[0].tokens.size / (time.perf_counter() - start)


def lengths_of(run_dir: pathlib.Path, policy: Scorer) -> list[int]:
    """Tokens of every text that the run scored."""
    found = [
        (line["prompt"], text, {})
        for line in read_jsonl(run_dir / "seam.jsonl")
        for text in (line["gold"], *(each["text"] for each in line["worse"]))
    ]
    encoded: list[Any] = policy.encode_all(Texts(*zip(*found, strict=True)))
    return [len(each.prompt) + len(each.completion) for each in encoded]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", required=True)
    parser.add_argument("--reward", required=True)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--completions", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    scorers = [
        open_likelihood(args.policy, ScoringConfig()),
        open_scorer(args.reward, ScoringConfig()),
    ]
    seconds, texts, plain, lengths, batch = [], [], [], [], None
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            start = time.perf_counter()
            run_dir = seam.run(
                seam.SeamConfig(
                    run_dir=f"{folder}/{number}",
                    policy=args.policy,
                    reward=args.reward,
                    data=[
                        f"testbed:worse?size={args.prompts}&count={args.completions}"
                    ],
                    estimators=["given"],
                )
            )
            seconds.append(time.perf_counter() - start)
            summary = json.loads((run_dir / "seam.json").read_text())
            texts.append(summary["texts_per_s"])
            if batch is None:
                lengths = lengths_of(run_dir, scorers[0])
                length = round(statistics.mean(lengths))
                batch = dense(length, 8192 // length, len(scorers[0].encoder.tokenizer))
            plain.append(plain_rate(scorers, batch, calls=20))
    mean = statistics.mean(lengths)
    rate = statistics.median(texts) * mean
    report = {
        "prompts": args.prompts,
        "completions": args.completions,
        "texts": len(lengths),
        "mean_tokens": mean,
        "device": str(jax.devices()[0]),
        "command_s": statistics.median(seconds),
        "texts_per_s": statistics.median(texts),
        "tokens_per_s": rate,
        "plain_tokens_per_s": statistics.median(plain),
        "ratio": rate / statistics.median(plain),
    }
    table = Table(title=f"SEAM of {args.prompts:,} prompts x {args.completions}")
    for name in ("", "texts/s", "tokens/s"):
        table.add_column(name, justify="right" if name else "left")
    table.add_row("seam", f"{report['texts_per_s']:,.0f}", f"{rate:,.0f}")
    table.add_row(
        "plain forward pass",
        f"{report['plain_tokens_per_s'] / mean:,.0f}",
        f"{report['plain_tokens_per_s']:,.0f}",
    )
    Console(width=100).print(
        table, f"{report['ratio']:.2f}x; the command: {report['command_s']:.0f} s"
    )
    print(json.dumps(report))


main()
