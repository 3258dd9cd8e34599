"""One RLOO step beside TRL: same weights, same prompts, same sizes.

    make bench                                    # after the other benchmarks
    python benchmarks/rloo_step.py --rounds 7 --layout shared --layout packed

One run, one machine: TRL lives in a process of its own (rloo_worker.py) and the sides
take turns step by step, so that a busy moment hits both. A step is what a user waits
for: 16 prompts of 32-128 tokens, 4 completions of 64 tokens each, their text scored by
a reward model, log-probabilities of the reference, advantages, one AdamW update, in
float32. Policy, reference and reward model have the small-5m shape. Ours is a run of
`rlhf-jax rloo`, `gather` and the update of its loop; reports, samples and checkpoints
are left out, on both sides.

Before anything is timed, TRL's first step is computed again from its own completions:
rewards, log-probabilities, advantages and the gradient's norm must be the same.
TRL scores completions as they were cut; ours reads the end token too, one more a text.
"""

import argparse
import collections
import contextlib
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

from rlhf_jax.algorithms.optimizer import (
    OptimizerConfig,
    make_optimizer,
    make_schedule,
)
from rlhf_jax.data.encoded import EncodedCompletion
from rlhf_jax.data.iterate import Order
from rlhf_jax.data.plan import LAYOUTS, Layout
from rlhf_jax.data.prepare import DataConfig
from rlhf_jax.data.tokenizers import save_tokenizer
from rlhf_jax.evals import scoring
from rlhf_jax.io.peak import measured_flops
from rlhf_jax.models.heads import RewardModel, init_head_model
from rlhf_jax.models.hf import export_hf
from rlhf_jax.models.llama import Llama, init_llama
from rlhf_jax.models.presets import PRESETS
from rlhf_jax.programs import experience as xp
from rlhf_jax.programs import rl_setup, rloo, sharded
from rlhf_jax.programs.reinforcement import Learner, RLCursor
from rlhf_jax.programs.scorer import ScoringConfig, open_scorer
from rlhf_jax.sampling.generate import SamplingConfig
from rlhf_jax.types import Rollout

SHAPE = "small-5m"
PROMPTS, SAMPLES, NEW_TOKENS = 16, 4, 64
PROMPT_TOKENS = (32, 128)
LEARNING_RATE, KL_COEF, CLIP_EPS = 1e-5, 0.05, 0.2
PARTS = ("generate", "reward", "logprobs", "update")
TOLERANCE = 1e-3
"""Relative difference of anything that both sides compute in the first step."""


def make_tokenizer(vocab_size: int) -> Any:
    """One character a token, so that texts join and split as ids do."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<end>", *(chr(0x4E00 + i) for i in range(1, vocab_size))]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<end>",
        # Never drawn, as min_new_tokens suppresses it: no completion holds padding.
        pad_token="<end>",
        clean_up_tokenization_spaces=False,
    )


def write_inputs(directory: pathlib.Path, count: int, seed: int) -> None:
    """Policy, reference, reward model and prompts, as files."""
    config, tokens = PRESETS[SHAPE], {"eos_token_id": 0, "pad_token_id": 0}
    keys = jax.random.split(jax.random.key(seed), 3)
    reference, other = (init_llama(Llama(config), key) for key in keys[:2])
    # Some way from its reference, or there would be no KL to compare.
    policy = jax.tree.map(lambda a, b: a + 0.1 * b, reference, other)
    reward = init_head_model(RewardModel(config), keys[2])
    for name, kind, params in (
        ("policy", "causal", policy),
        ("reference", "causal", reference),
        ("reward", "reward", reward),
    ):
        export_hf(directory / name, config, params, kind=kind, tokens=tokens)
        save_tokenizer(make_tokenizer(config.vocab_size), directory / name)
    rng = np.random.default_rng(seed)
    lengths = np.resize(np.linspace(*PROMPT_TOKENS, PROMPTS).astype(int), count)
    with open(directory / "prompts.jsonl", "w", encoding="utf-8") as file:
        for length in rng.permutation(lengths):
            ids = 0x4E00 + rng.integers(1, config.vocab_size, length)
            file.write(json.dumps({"prompt": "".join(map(chr, ids))}) + "\n")


class Compilations:
    """Counts what XLA compiles, and the seconds that takes."""

    def __init__(self) -> None:
        self.count, self.seconds = 0, 0.0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.count, self.seconds = self.count + 1, self.seconds + duration


class Ours:
    """Steps of one layout of `rlhf-jax rloo`."""

    def __init__(
        self,
        directory: pathlib.Path,
        layout: Layout,
        steps: int,
        seed: int,
        stack: contextlib.ExitStack,
    ) -> None:
        self.reward = str(directory / "reward")
        self.config = config = rloo.RlooConfig(
            run_dir=str(directory / f"run-{layout}"),
            model=str(directory / "policy"),
            reference=str(directory / "reference"),
            reward=[self.reward],
            data=[str(directory / "prompts.jsonl")],
            batch_size=PROMPTS,
            steps=steps,
            seed=seed,
            loss=rloo.RlooLossConfig(clip_eps=CLIP_EPS, kl_coef=KL_COEF),
            sampling=SamplingConfig(
                num_samples=SAMPLES,
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
            ),
            rows=DataConfig(layout=layout),
            optimizer=OptimizerConfig(LEARNING_RATE, "constant", warmup=0.0),
        )
        self.setting = setting = stack.enter_context(rl_setup.open_rl(config))
        schedule = make_schedule(config.optimizer, steps)
        self.tx = make_optimizer(config.optimizer, schedule)
        self.key = jax.random.key(seed)
        self.start()
        self.update = sharded.compile_update(
            rloo.make_objective(config, setting), self.tx, self.learner.policy
        )

    def start(self) -> None:
        """Back to the initial policy and the first prompts."""
        params = jax.tree.map(jax.numpy.copy, self.setting.trained)
        state = sharded.create_state(params, self.tx, self.setting.mesh)
        self.learner, self.cursor = Learner(state), RLCursor()

    def prompts(self, start: int, count: int) -> list[Any]:
        """Prompts in the order of the run."""
        setting, seed = self.setting, self.config.seed
        order = Order(len(setting.prompts), seed=seed, groups=setting.prompts.groups)
        return [setting.prompts[row] for row in order(start, count)]

    def step(self) -> dict[str, float]:
        """Seconds of one step and of its parts."""
        start = time.perf_counter()
        completions, metrics, _ = self.setting.gather(self.learner, self.cursor)
        gathered = time.perf_counter()
        self.learn(completions)
        done = time.perf_counter()
        self.cursor.step += 1
        parts = {part: metrics[f"perf/{part}_s"] for part in PARTS[:3]}
        return {"seconds": done - start, **parts, "update": done - gathered}

    def learn(self, completions: xp.Completions) -> dict[str, Any]:
        """Advantages and one update."""
        config, setting = self.config, self.setting
        completions, _ = rloo.make_targets(config.loss, completions, self.cursor)
        [batch] = xp.minibatches(
            completions,
            setting.packing,
            count=1,
            accum_steps=1,
            rng=xp.epoch_rng(config.seed, self.cursor.step, 0),
        )
        policy, metrics = self.update(
            self.learner.policy, setting.put_micro(batch), self.key
        )
        jax.block_until_ready((policy, metrics))
        self.learner = Learner(policy)
        return {"advantages": completions.advantages, **metrics}

    def replay(self, first: dict[str, Any]) -> dict[str, Any]:
        """What TRL computed in its first step, from its completions."""
        setting, policy = self.setting, self.learner.policy
        scorer = open_scorer(self.reward, ScoringConfig())
        cut = [
            EncodedCompletion(prompt, completion)
            for prompt, completion in zip(first["prompts"], first["completions"])
        ]
        rewards = scoring.score(scorer.score_fn, cut)
        tokens = np.array(first["completions"], np.int32)
        zeros = np.zeros(tokens.shape, np.float32)
        rollout = Rollout(
            tokens=tokens,
            mask=np.ones(tokens.shape, bool),
            stopped=np.zeros(len(tokens), bool),
            logprobs=zeros,
            policy_logprobs=zeros,
            sampling_logprobs=zeros,
        )
        prompts = self.prompts(0, PROMPTS)
        expected = [list(map(int, p.tokens)) for p in prompts for _ in range(SAMPLES)]
        if first["prompts"] != expected:
            sys.exit("TRL's first step had other prompts")
        completions = xp.collect(prompts, rollout, rewards, self.config.shaping)

        def logprobs(function: Any) -> np.ndarray:
            return xp.forward(
                lambda rows: function(setting.put(rows)),
                completions,
                setting.packing,
                chunk=setting.chunk,
            )

        completions.old_logprobs = logprobs(
            functools.partial(setting.logprobs, policy.params)
        )
        completions.ref_logprobs = logprobs(
            functools.partial(setting.ref_logprobs, policy)
        )
        learnt = self.learn(completions)
        return {
            "rewards": rewards,
            "logprobs": completions.old_logprobs.sum(axis=1),
            "ref_logprobs": completions.ref_logprobs.sum(axis=1),
            "advantages": learnt["advantages"],
            "grad_norm": float(learnt["grad_norm"]),
        }


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """Largest difference of each quantity, relative to its largest value."""
    found = {}
    for name, mine in ours.items():
        other = np.asarray(theirs[name])
        scale = np.abs(other).max()
        found[name] = float(np.abs(np.asarray(mine) - other).max() / scale)
    return found


def measure(layouts: list[Layout], rounds: int, seed: int) -> dict[str, Any]:
    """All figures."""
    steps = rounds + 1
    compilations = Compilations()
    with contextlib.ExitStack() as stack:
        directory = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_inputs(directory, steps * PROMPTS, seed)
        ours = {
            layout: Ours(directory, layout, steps, seed, stack) for layout in layouts
        }
        job = {
            "policy": str(directory / "policy"),
            "reference": str(directory / "reference"),
            "reward": str(directory / "reward"),
            "out": str(directory / "trl"),
            "prompts": [
                prompt.prompt for prompt in ours[layouts[0]].prompts(0, steps * PROMPTS)
            ],
            "prompts_a_step": PROMPTS,
            "samples": SAMPLES,
            "new_tokens": NEW_TOKENS,
            "steps": steps,
            "kl_coef": KL_COEF,
            "clip_eps": CLIP_EPS,
            "learning_rate": LEARNING_RATE,
        }
        peer = Peer("rloo_worker.py", job, directory)
        ceiling = {"torch": peer.hello["ceiling"], "xla": measured_flops(2048)}
        # A whole run before the one that is timed: every shape is compiled.
        compiled: dict[str, list[tuple[int, float]]] = collections.defaultdict(list)
        for layout, side in ours.items():
            for _ in range(steps):
                before = compilations.count, compilations.seconds
                side.step()
                compiled[layout].append(
                    (compilations.count - before[0], compilations.seconds - before[1])
                )
            side.start()
        before_timed = compilations.count
        found: dict[str, list[dict[str, float]]] = {s: [] for s in ("trl", *layouts)}
        for _ in range(steps):
            answer = peer.ask()
            parts = answer["parts"]
            update = answer["seconds"] - parts["before_update"]
            found["trl"].append(
                {**parts, "seconds": answer["seconds"], "update": update}
            )
            for layout, side in ours.items():
                found[layout].append(side.step())
        compiled_late = compilations.count - before_timed
        bye = peer.finish()
        ceiling["torch"] = max(ceiling["torch"], bye["ceiling"])
        ceiling["xla"] = max(ceiling["xla"], measured_flops(2048))
        equality = {}
        for layout, side in ours.items():
            side.start()
            replayed = side.replay(bye["first"])
            equality[layout] = differences(replayed, bye["first"])
    if max(max(found.values()) for found in equality.values()) > TOLERANCE:
        sys.exit(f"the two sides do not compute the same: {equality}")
    rows: dict[str, dict[str, Any]] = {}
    for side, values in found.items():
        timed = values[1:]  # the first round warms TRL up
        row = {
            f"{part}_s": statistics.median(step[part] for step in timed)
            for part in PARTS
        }
        row["step_s"] = statistics.median(step["seconds"] for step in timed)
        row["step_s_min"] = min(step["seconds"] for step in timed)
        row["new_tokens_per_s"] = PROMPTS * SAMPLES * NEW_TOKENS / row["generate_s"]
        rows[side] = row
    for layout in layouts:
        counts, seconds = zip(*compiled[layout])
        rows[layout] |= {"compile_s": sum(seconds), "compilations": list(counts)}
    return {
        "shape": SHAPE,
        "prompts": PROMPTS,
        "samples": SAMPLES,
        "new_tokens": NEW_TOKENS,
        "rounds": rounds,
        "seed": seed,
        "machine": f"{platform.machine()}, {peer.hello['threads']} threads",
        "versions": {"jax": jax.__version__, "trl": peer.hello["version"]},
        "ceiling_gflops": {by: value / 1e9 for by, value in ceiling.items()},
        "relative_differences": equality,
        "compilations_while_timed": compiled_late,
        "results": rows,
    }


def show(report: dict[str, Any], console: Console) -> None:
    """The report as a table, the comparison and ceilings under it."""
    table = Table(
        title=f"RLOO step, {report['shape']}: {report['prompts']} prompts x "
        f"{report['samples']} x {report['new_tokens']} new tokens, float32, median of "
        f"{report['rounds']} steps"
    )
    columns = ("side", "s/step", *PARTS, "other", "beside TRL", "compile s (programs)")
    for column in columns:
        table.add_column(column, justify="left" if column == "side" else "right")
    trl = report["results"]["trl"]
    for name, row in report["results"].items():
        parts = [row[f"{part}_s"] for part in PARTS]
        table.add_row(
            f"TRL {report['versions']['trl']}" if name == "trl" else f"rlhf_jax {name}",
            f"{row['step_s']:.2f}",
            *(f"{seconds:.2f}" for seconds in parts),
            f"{row['step_s'] - sum(parts):.2f}",
            f"{trl['step_s'] / row['step_s']:.2f}x",
            f"{row['compile_s']:.0f} ({sum(row['compilations'])})"
            if "compile_s" in row
            else "",
        )
    console.print(table)
    ceilings = report["ceiling_gflops"]
    console.print(
        f"float32 matmul ceiling: torch {ceilings['torch']:.0f} GFLOP/s, "
        f"XLA {ceilings['xla']:.0f} GFLOP/s ({report['machine']})"
    )
    for layout, found in report["relative_differences"].items():
        text = ", ".join(f"{name} {value:.0e}" for name, value in found.items())
        console.print(f"TRL's first step computed by rlhf_jax {layout}: {text}")
    for layout, row in report["results"].items():
        if "compilations" in row:
            text = " ".join(map(str, row["compilations"]))
            console.print(f"programs compiled in each step of {layout}: {text}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layout", choices=LAYOUTS, action="append")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    require_peer()
    report = measure(args.layout or ["shared"], args.rounds, args.seed)
    show(report, Console(width=120))
    print(json.dumps(report))


main()
