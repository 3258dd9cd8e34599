"""What the loop of `rloo` and `ppo` calls: completions of prompts, their scores, their
log-probabilities; and the same on held-out prompts.

A `Setting` holds all that stays while the learner changes; `gather` and `evaluate` are
the loop's. `rl_setup.open_rl` makes it.
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rlhf_jax.algorithms.update import join_trees
from rlhf_jax.data.encode import Encoder
from rlhf_jax.data.encoded import EncodedPrompt
from rlhf_jax.data.iterate import Order
from rlhf_jax.data.store import PromptDataset
from rlhf_jax.models.llama import Llama
from rlhf_jax.programs import experience as xp
from rlhf_jax.programs import rl_metrics
from rlhf_jax.programs.reinforcement import Learner, RLCursor
from rlhf_jax.programs.rewards import Rewards
from rlhf_jax.rl import streams
from rlhf_jax.types import Rollout, Sequences, TrainState


@dataclasses.dataclass(frozen=True, eq=False)
class Setting:
    """Everything around the learner; its methods are functions of the learner."""

    config: Any
    run_dir: pathlib.Path
    mesh: Mesh
    model: Llama
    trained: Any
    """Leaves of the policy that are trained, and those that are not."""
    frozen: Any
    tokenizer: Any
    encoder: Encoder
    prompts: PromptDataset
    evals: dict[str, PromptDataset]
    rewards: Rewards
    gold: Rewards | None
    packing: xp.Packing
    chunk: int
    """Completions in one forward pass."""
    generate: Callable[..., Rollout]
    """Jitted (params, PromptBatch, key) -> Rollout."""
    ref_logprobs: Callable[[TrainState, Sequences], jax.Array]
    """(policy, rows) -> [B T]; of the policy at most its frozen leaves are read."""
    logprobs: Callable[[Any, Sequences], jax.Array]
    """Jitted (params, rows) -> [B T]."""
    put: Callable[[Any], Any]
    put_micro: Callable[[Any], Any]
    """Host arrays to the mesh; the second where micro-batches lead."""

    def sample(
        self, policy: TrainState, prompts: list[EncodedPrompt], key: jax.Array
    ) -> Rollout:
        """Completions of the prompts, on the host."""
        batch = xp.prompt_batch(prompts, pad_id=self.encoder.pad_id)
        params = join_trees(policy.params, policy.frozen)
        return jax.device_get(self.generate(params, self.put(batch), key))

    def gather(
        self, learner: Learner, cursor: RLCursor
    ) -> tuple[xp.Completions, dict[str, float], list[dict]]:
        """Samples, scores and measures the next prompts; moves the cursor past them."""
        config, clock = self.config, _Clock()
        order = Order(len(self.prompts), seed=config.seed, groups=self.prompts.groups)
        rows = order(cursor.next_row, config.batch_size)
        prompts = [self.prompts[row] for row in rows]
        key = jax.random.fold_in(jax.random.key(config.seed), streams.SAMPLING)
        rollout = self.sample(
            learner.policy, prompts, jax.random.fold_in(key, cursor.step)
        )
        clock.lap("generate")
        texts = xp.as_texts(prompts, rollout, self.encoder)
        total, columns = xp.score(self.rewards, texts)
        gold = None if self.gold is None else xp.score(self.gold, texts)[0]
        clock.lap("reward")
        completions = xp.collect(prompts, rollout, total, config.shaping)
        completions.ref_logprobs = xp.forward(
            self._on_mesh(functools.partial(self.ref_logprobs, learner.policy)),
            completions,
            self.packing,
            chunk=self.chunk,
        )
        if config.recompute_logprobs:
            params = join_trees(learner.policy.params, learner.policy.frozen)
            now = functools.partial(self.logprobs, params)
            completions.old_logprobs = xp.forward(
                self._on_mesh(now),
                completions,
                self.packing,
                chunk=self.chunk,
                parts=xp.epoch_parts(
                    completions,
                    count=config.minibatches,
                    accum_steps=config.accum_steps,
                    rng=xp.epoch_rng(config.seed, cursor.step, 0),
                ),
            )
        clock.lap("logprobs")
        cursor.next_row += config.batch_size
        metrics = (
            rl_metrics.measure(completions, rollout, total, columns, gold)
            | clock.seconds
        )
        tokens = float(completions.mask.sum())
        metrics["perf/new_tokens_per_s"] = tokens / clock.seconds["perf/generate_s"]
        return (
            completions,
            metrics,
            rl_metrics.sample_rows(texts, completions, total, columns, gold),
        )

    def evaluate(self, learner: Learner) -> dict[str, float]:
        """eval/NAME/METRIC on the held-out prompts, with the same noise every time."""
        found: dict[str, float] = {}
        size = self.config.batch_size
        base = jax.random.fold_in(jax.random.key(self.config.seed), streams.EVALUATION)
        for name, dataset in self.evals.items():
            rows: list[dict[str, np.ndarray]] = []
            for start in range(0, len(dataset), size):
                # The last batch is filled up with rows from the beginning, which do
                # not count: one shape compiles.
                real = min(size, len(dataset) - start)
                prompts = [dataset[(start + n) % len(dataset)] for n in range(size)]
                key = jax.random.fold_in(base, start)
                rollout = self.sample(learner.policy, prompts, key)
                rows.append(self._judge(prompts, rollout, real))
            for metric in rows[0]:
                mean = np.concatenate([row[metric] for row in rows]).mean()
                found[f"eval/{name}/{metric}"] = float(mean)
        return found

    def _judge(
        self, prompts: list[EncodedPrompt], rollout: Rollout, real: int
    ) -> dict[str, np.ndarray]:
        """Numbers of each completion of the first `real` prompts."""
        keep = real * self.config.sampling.num_samples
        rollout = jax.tree.map(lambda x: x[:keep], rollout)
        texts = xp.as_texts(prompts[:real], rollout, self.encoder)
        found = {
            "proxy": xp.score(self.rewards, texts)[0],
            "length": rollout.mask.sum(axis=1).astype(np.float64),
            "eos_rate": rollout.stopped.astype(np.float64),
        }
        if self.gold is not None:
            found["gold"] = xp.score(self.gold, texts)[0]
        return found

    def _on_mesh(self, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda sequences: function(self.put(sequences))


class _Clock:
    """Seconds of the parts of a step, as perf/NAME_s."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[f"perf/{name}_s"], self.last = now - self.last, now
