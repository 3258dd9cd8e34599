"""Sampling beside transformers: same weights, same prompts, as many new tokens.

    make bench                                    # all cases, after reward_step.py
    python benchmarks/generation.py --case ragged --rounds 3

One run, one machine: transformers lives in a process of its own (generation_worker.py)
and the sides take turns call by call, so that a busy moment hits all of them. A call is
everything from lists of token ids to generated ids on the host, in float32, sampled at
temperature 1. Before anything is timed, greedy continuations are compared; they may
part only where the two best tokens are equal to float rounding.

In the cases fixed, samples and smollm2 nothing stops early. In ragged one token in 48
ends a completion, and a token is counted only if it belongs to a completion: what a row
computes after its own end is waste. rlhf_jax also returns the log-probability of every
token, which transformers' callers compute again.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import platform
import statistics
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np
from peer import Peer, require_peer
from rich.console import Console
from rich.table import Table

from rlhf_jax.data.encoded import EncodedPrompt
from rlhf_jax.io.peak import measured_flops
from rlhf_jax.models.config import LlamaConfig
from rlhf_jax.models.flops import train_flops
from rlhf_jax.models.hf import export_hf
from rlhf_jax.models.llama import Llama, init_llama
from rlhf_jax.models.presets import PRESETS
from rlhf_jax.programs.experience import prompt_batch
from rlhf_jax.sampling.generate import SamplingConfig, make_generate

TIE = 1e-4
"""Logits of two tokens this close are equal to float rounding."""


@dataclasses.dataclass(frozen=True)
class Case:
    """What is generated, and the forms of each side that take part."""

    shape: str
    prompts: int
    new_tokens: int
    samples: int = 1
    prompt_tokens: tuple[int, int] = (32, 128)
    stop_one_in: int = 0
    """Every n-th token of the vocabulary stops a completion; 0 = none does."""
    slots: tuple[int, ...] = (0,)
    """Ours: completions in the making at a time; 0 = all."""
    rows: tuple[int, ...] = (0,)
    """Theirs: rows of one call; 0 = all."""
    caches: tuple[str | None, ...] = (None,)
    """Theirs: the kind of cache; None = the default, which grows."""
    continuous: bool = False
    """Theirs: continuous batching too."""

    @property
    def total(self) -> int:
        """Completions."""
        return self.prompts * self.samples

    def stops(self, vocab_size: int) -> list[int]:
        """Tokens that end a completion."""
        every = self.stop_one_in
        return list(range(0, vocab_size, every)) if every else []


CASES = {
    "fixed": Case("small-5m", 64, 128, caches=(None, "static")),
    "samples": Case("small-5m", 16, 128, samples=4, caches=(None, "static")),
    "ragged": Case(
        "small-5m",
        64,
        128,
        samples=4,
        stop_one_in=48,
        slots=(0, 64),
        rows=(0, 64),
        continuous=True,
    ),
    "smollm2": Case("smollm2-135m", 16, 32, caches=(None, "static")),
}


def sample_prompts(case: Case, vocab_size: int, seed: int) -> list[list[int]]:
    """Random ids, of lengths spread evenly over the range of the case."""
    rng = np.random.default_rng(seed)
    low, high = case.prompt_tokens
    lengths = rng.permutation(np.linspace(low, high, case.prompts).astype(int))
    return [rng.integers(2, vocab_size, length).tolist() for length in lengths]


class Ours:
    """Calls of one form of rlhf_jax, compiled ahead."""

    def __init__(
        self,
        config: LlamaConfig,
        params: Any,
        case: Case,
        prompts: list[list[int]],
        *,
        slots: int = 0,
        greedy: bool = False,
    ) -> None:
        stops = case.stops(config.vocab_size)
        sampling = SamplingConfig(
            num_samples=case.samples,
            max_new_tokens=case.new_tokens,
            min_new_tokens=0 if stops else case.new_tokens,
            temperature=0.0 if greedy else 1.0,
            slots=slots,
        )
        self.params = params
        self.prompts = [EncodedPrompt(tokens=p, prompt="", row={}) for p in prompts]
        # One that stops is needed; min_new_tokens keeps it from being drawn.
        generate = make_generate(Llama(config), sampling, stop_ids=tuple(stops or [0]))
        start = time.perf_counter()
        arguments = (params, self.batch(), jax.random.key(0))
        self.generate = jax.jit(generate).lower(*arguments).compile()
        self.compile_s = time.perf_counter() - start

    def batch(self) -> Any:
        return prompt_batch(self.prompts, pad_id=0)

    def turn(self, seed: int) -> dict[str, float]:
        """Seconds of one call, and the tokens of its completions."""
        key = jax.block_until_ready(jax.random.key(seed))
        start = time.perf_counter()
        rollout = jax.device_get(self.generate(self.params, self.batch(), key))
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens": int(rollout.mask.sum())}

    def completions(self) -> list[list[int]]:
        rollout = self.generate(self.params, self.batch(), jax.random.key(0))
        pairs = zip(np.asarray(rollout.tokens), np.asarray(rollout.mask))
        return [tokens[mask].tolist() for tokens, mask in pairs]


def compare(
    ours: list[list[int]], theirs: list[list[int]], gaps: list[list[float]]
) -> dict[str, int]:
    """How many completions are equal, or equal up to a tie of the two best tokens."""
    found = {"equal": 0, "equal_up_to_a_tie": 0, "different": 0}
    for mine, other, gap in zip(ours, theirs, gaps, strict=True):
        parted = [at for at, pair in enumerate(zip(mine, other)) if pair[0] != pair[1]]
        if mine == other:
            found["equal"] += 1
        elif parted and gap[parted[0]] < TIE:
            found["equal_up_to_a_tie"] += 1
        else:
            found["different"] += 1
    return found


def useful_flops(config: LlamaConfig, prompts: list[list[int]], tokens: float) -> float:
    """Least work: each prompt read once, `tokens` new tokens in all, evenly spread."""
    lengths = np.array([len(p) for p in prompts], float)
    each = tokens / len(lengths)
    visible = float(np.sum(lengths**2 / 2 + each * (lengths + each / 2)))
    backbone = train_flops(config, tokens=lengths.sum() + tokens, visible=visible) / 3
    return backbone + 2.0 * config.hidden_size * config.vocab_size * tokens


def their_forms(case: Case) -> dict[str, dict[str, Any]]:
    """Name of each form of transformers that takes part, and what it asks for."""
    forms: dict[str, dict[str, Any]] = {}
    for cache in case.caches:
        for rows in case.rows:
            label = "transformers" + (f", {cache} cache" if cache else "")
            label += f", {rows} rows a call" if rows else ""
            forms[label] = {"cache": cache, "rows": rows}
    if case.continuous:
        forms["transformers, continuous batching"] = {"continuous": True}
    return forms


def measure(name: str, case: Case, rounds: int, seed: int) -> dict[str, Any]:
    """All figures of one case."""
    config = PRESETS[case.shape]
    prompts = sample_prompts(case, config.vocab_size, seed)
    params = init_llama(Llama(config), jax.random.key(seed))
    with tempfile.TemporaryDirectory() as scratch:
        directory = pathlib.Path(scratch)
        export_hf(directory, config, params, kind="causal")
        peer = Peer("generation_worker.py", {"model": str(directory)}, directory)
    request = {
        "prompts": prompts,
        "samples": case.samples,
        "new_tokens": case.new_tokens,
        "stops": case.stops(config.vocab_size),
        "greedy": False,
        "rows": 0,
        "cache": None,
        "continuous": False,
    }
    ceiling = {"torch": peer.hello["ceiling"], "xla": measured_flops(2048)}
    theirs = peer.ask(**request | {"greedy": True})
    expected = [row for row in theirs["completions"] for _ in range(case.samples)]
    gaps = [row for row in theirs["gaps"] for _ in range(case.samples)]
    greedy = {
        f"slots {slots}": compare(
            Ours(config, params, case, prompts, slots=slots, greedy=True).completions(),
            expected,
            gaps,
        )
        for slots in case.slots
    }
    if any(found["different"] for found in greedy.values()):
        sys.exit(f"{name}: greedy continuations differ: {greedy}")
    sides: dict[str, Any] = {
        label: functools.partial(peer.ask, **request | form)
        for label, form in their_forms(case).items()
    }
    ours = {}
    for slots in case.slots:
        label = "rlhf_jax" + (f", {slots} slots" if slots else "")
        ours[label] = Ours(config, params, case, prompts, slots=slots)
        sides[label] = ours[label].turn
    found: dict[str, list[dict[str, float]]] = {label: [] for label in sides}
    for number in range(rounds + 1):
        for label, turn in sides.items():
            answer = turn(seed=number)
            if not case.stop_one_in and answer["tokens"] != (
                case.total * case.new_tokens
            ):
                sys.exit(f"{name}: {label} made {answer['tokens']} tokens")
            found[label].append(answer)
    bye = peer.finish()
    ceiling["torch"] = max(ceiling["torch"], bye["ceiling"])
    ceiling["xla"] = max(ceiling["xla"], measured_flops(2048))

    def summarise(label: str) -> dict[str, Any]:
        turns = found[label][1:]  # the first round warms every side up
        peak = ceiling["xla" if label in ours else "torch"]
        work = [useful_flops(config, prompts, t["tokens"]) for t in turns]
        row = {
            "call_s": statistics.median(t["seconds"] for t in turns),
            "call_s_min": min(t["seconds"] for t in turns),
            "tokens_per_s": statistics.median(
                t["tokens"] / t["seconds"] for t in turns
            ),
            "mean_length": statistics.mean(t["tokens"] / case.total for t in turns),
            "fraction_of_ceiling": statistics.median(
                flops / t["seconds"] / peak for flops, t in zip(work, turns)
            ),
        }
        return row | ({"compile_s": ours[label].compile_s} if label in ours else {})

    return {
        "case": name,
        **dataclasses.asdict(case),
        "rounds": rounds,
        "seed": seed,
        "machine": f"{platform.machine()}, {peer.hello['threads']} threads",
        "versions": {"jax": jax.__version__, "transformers": peer.hello["version"]},
        "ceiling_gflops": {by: value / 1e9 for by, value in ceiling.items()},
        "greedy": greedy,
        "results": {label: summarise(label) for label in sides},
    }


def show(report: dict[str, Any], console: Console) -> None:
    """The report as a table, the comparison and ceilings under it."""
    low, high = report["prompt_tokens"]
    many = "up to " if report["stop_one_in"] else ""
    table = Table(
        title=f"{report['case']}: {report['shape']}, {report['prompts']} prompts of "
        f"{low}-{high} tokens x {report['samples']}, {many}{report['new_tokens']} new "
        f"tokens, float32, median of {report['rounds']} calls"
    )
    for column in (
        "side",
        "s/call",
        "new tokens/s",
        "mean length",
        "of ceiling",
        "beside transformers",
        "compile s",
    ):
        table.add_column(column, justify="left" if column == "side" else "right")
    results = report["results"]
    # Beside the best form of transformers, not beside its default.
    best = max(
        row["tokens_per_s"] for row in results.values() if "compile_s" not in row
    )
    for name, row in results.items():
        table.add_row(
            name,
            f"{row['call_s']:.2f}",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['mean_length']:.1f}",
            f"{row['fraction_of_ceiling']:.1%}",
            f"{row['tokens_per_s'] / best:.2f}x",
            f"{row['compile_s']:.0f}" if "compile_s" in row else "",
        )
    console.print(table)
    ceilings = report["ceiling_gflops"]
    console.print(
        f"float32 matmul ceiling: torch {ceilings['torch']:.0f} GFLOP/s, "
        f"XLA {ceilings['xla']:.0f} GFLOP/s ({report['machine']})"
    )
    for form, found in report["greedy"].items():
        console.print(
            f"greedy continuations ({form}): {found['equal']} equal, "
            f"{found['equal_up_to_a_tie']} equal up to a tie, "
            f"{found['different']} different"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    require_peer()
    for name in args.case or CASES:
        report = measure(name, CASES[name], args.rounds, args.seed)
        show(report, Console(width=120))
        print(json.dumps(report))


main()
