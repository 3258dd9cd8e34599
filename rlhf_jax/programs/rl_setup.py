"""What `rloo` and `ppo` share: models, rewards, prompts, sampling; metrics of a step.

`open_rl` makes a `Setting` from a config; its methods are the loop's `gather` and
`evaluate`. Where adapters are trained, the reference policy is the same base with the
adapters left out: no second copy.
"""

import contextlib
import dataclasses
import functools
import hashlib
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rlhf_jax import config as configs
from rlhf_jax.algorithms.policy import policy_apply
from rlhf_jax.algorithms.update import join_trees
from rlhf_jax.data import prepare
from rlhf_jax.data.encode import Encoder
from rlhf_jax.data.encoded import EncodedPrompt
from rlhf_jax.data.groups import group_row_length
from rlhf_jax.data.iterate import Order
from rlhf_jax.data.plan import row_bucket
from rlhf_jax.data.store import PromptDataset
from rlhf_jax.models import lora
from rlhf_jax.models.config import LoraConfig
from rlhf_jax.models.llama import Llama
from rlhf_jax.programs import experience as xp
from rlhf_jax.programs import rl_metrics, runs, sharded
from rlhf_jax.programs.models import load_policy
from rlhf_jax.programs.reinforcement import Learner, RLCursor
from rlhf_jax.programs.rewards import Rewards, open_rewards
from rlhf_jax.sampling.generate import make_generate
from rlhf_jax.sharding import ShardingRules, batch_devices
from rlhf_jax.types import Rollout, Sequences, TrainState

_SAMPLING, _EVALUATION = 1, 2
"""Streams of the run's key."""


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
        key = jax.random.fold_in(jax.random.key(config.seed), _SAMPLING)
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
        base = jax.random.fold_in(jax.random.key(self.config.seed), _EVALUATION)
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


@contextlib.contextmanager
def open_rl(config: Any) -> Iterator[Setting]:
    """The setting of a run, its directory locked and its mesh set.

    Args:
        config: of rloo or ppo.
    """
    sets = configs.parse_named(config.eval_data, "--eval_data")
    one_process()
    with runs.opened(config) as (run_dir, mesh):
        slices = batch_devices(mesh)
        if config.batch_size % slices:
            raise ValueError(
                f"batch_size {config.batch_size}: expected a multiple of the {slices} "
                "devices that share a batch (mesh.data x mesh.fsdp)"
            )
        model, params, tokenizer = load_policy(
            config.model,
            compute=config.compute,
            lora=config.lora,
            mesh=mesh,
            key=jax.random.key(config.seed),
        )
        encoder = prepare.make_encoder(tokenizer, config.rows)
        rows = dataclasses.replace(
            config.rows, max_prompt_length=prompt_limit(config, model)
        )
        data = runs.prepare_sets(
            prepare.prepare_prompts,
            dataclasses.replace(config, rows=rows),
            sets,
            encoder,
            run_dir,
        )
        trained, frozen = lora.split_params(
            params, "lora" if config.lora.rank else "all"
        )
        opened = functools.partial(
            open_rewards,
            scoring=config.scoring,
            timeout_s=config.shaping.timeout_s,
            encoder=encoder,
            row_length=_scored_length(config, data),
        )
        apply = policy_apply(
            model, temperature=_temperature(config), deterministic=True
        )
        logprobs = jax.jit(lambda p, s: apply(p, s, jax.random.key(0))[0])
        yield Setting(
            config=config,
            run_dir=run_dir,
            mesh=mesh,
            model=model,
            trained=trained,
            frozen=frozen,
            tokenizer=tokenizer,
            encoder=encoder,
            prompts=data.train,
            evals=data.evals,
            rewards=opened(config.reward),
            gold=None if config.gold is None else opened([config.gold]),
            packing=_packing(config, data, encoder, mesh),
            chunk=_chunk(config),
            generate=jax.jit(
                make_generate(
                    model,
                    config.sampling,
                    stop_ids=stop_ids(config, encoder),
                    rules=decode_rules(model),
                )
            ),
            ref_logprobs=_reference(config, model, params, mesh),
            logprobs=logprobs,
            put=sharded.make_put(mesh),
            put_micro=sharded.make_put(mesh, accum_steps=config.accum_steps),
        )


def check_rl(config: Any) -> None:
    """Refuses sizes that cannot be; shared by the configs of rloo and ppo."""
    for name in ("data", "reward"):
        if not getattr(config, name):
            raise ValueError(f"{name}: expected at least one --{name} SPEC")
    for name in ("batch_size", "steps", "epochs", "minibatches", "accum_steps"):
        if getattr(config, name) < 1:
            raise ValueError(
                f"{name}: expected at least 1, got {getattr(config, name)}"
            )
    if config.seed < 0:
        raise ValueError(f"seed: expected at least 0, got {config.seed}")
    if config.batch_size % (config.minibatches * config.accum_steps):
        raise ValueError(
            f"batch_size {config.batch_size}: expected a multiple of minibatches "
            f"{config.minibatches} x accum_steps {config.accum_steps}"
        )


def one_process() -> None:
    """Refuses several processes: each would build the whole batch as its slice.

    Raises:
        ValueError: jax runs in more than one process.
    """
    if jax.process_count() > 1:
        raise ValueError(
            f"sampling runs in one process, jax has {jax.process_count()}; use the "
            "devices of one host"
        )


def stop_ids(config: Any, encoder: Encoder) -> tuple[int, ...]:
    """The end token of the template and the tokens that config.stop names.

    Raises:
        ValueError: a stop string that is not one token.
    """
    ids = [encoder.eos_id]
    for text in config.stop:
        found = encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(found) != 1:
            raise ValueError(
                f"stop {text!r}: expected one token of the tokenizer, got {len(found)}"
            )
        ids.append(found[0])
    return tuple(dict.fromkeys(ids))


def decode_rules(model: Llama) -> ShardingRules:
    """Weights whole along the model width: sharded, they would be gathered at every
    token."""
    return dataclasses.replace(model.rules, embed=None)


def _temperature(config: Any) -> float:
    """Of ratios and KL: that of the sampling; greedy sampling has none, so 1."""
    return config.sampling.temperature or 1.0


def prompt_limit(config: Any, model: Llama) -> int:
    """Tokens of a prompt that leave room for a completion."""
    longest = min(config.rows.max_length, model.config.max_position_embeddings)
    room = longest - config.sampling.max_new_tokens
    if room < 1:
        raise ValueError(
            f"sampling.max_new_tokens {config.sampling.max_new_tokens}: leaves no room "
            f"for a prompt in {longest} tokens (rows.max_length and the model's "
            "max_position_embeddings); lower it, or raise rows.max_length"
        )
    return min(room, config.rows.max_prompt_length or room)


def _packing(config: Any, data: runs.Data, encoder: Encoder, mesh: Mesh) -> xp.Packing:
    longest = int(data.train.lengths.max())
    length = config.rows.row_length or group_row_length(
        longest,
        config.sampling.max_new_tokens,
        config.sampling.num_samples,
    )
    needed = longest + config.sampling.max_new_tokens
    if length < needed:
        raise ValueError(
            f"rows.row_length {length}: the longest prompt of {longest} tokens and "
            f"sampling.max_new_tokens {config.sampling.max_new_tokens} need {needed}; "
            "set rows.row_length to at least that, or leave it out"
        )
    return xp.Packing(
        layout=config.rows.layout,
        row_length=length,
        rows_multiple_of=batch_devices(mesh),
        pad_id=encoder.pad_id,
    )


def _scored_length(config: Any, data: runs.Data) -> int:
    """A row that holds any prompt with its completion."""
    prompts = max(int(d.lengths.max()) for d in (data.train, *data.evals.values()))
    return row_bucket(prompts + config.sampling.max_new_tokens)


def _chunk(config: Any) -> int:
    """Completions of a micro-batch: what fits in a training step fits in a forward."""
    groups = config.batch_size // (config.minibatches * config.accum_steps)
    return groups * config.sampling.num_samples


def _reference(
    config: Any, model: Llama, params: Any, mesh: Mesh
) -> Callable[[TrainState, Sequences], jax.Array]:
    """(policy, rows) -> reference log-probabilities [B T]."""
    bare, ref_params = model.clone(lora=LoraConfig()), None
    if config.reference is not None:
        bare, ref_params, _ = load_policy(
            config.reference,
            compute=config.compute,
            mesh=mesh,
            key=jax.random.key(config.seed),
        )
        if bare.config.vocab_size != model.config.vocab_size:
            raise ValueError(
                f"reference {config.reference}: vocabulary of "
                f"{bare.config.vocab_size}, the policy has {model.config.vocab_size}; "
                "the two must share a tokenizer"
            )
    elif not config.lora.rank:
        # The policy's own leaves are given away at the first update.
        ref_params = jax.tree.map(lambda x: x.copy(), params)
    apply = policy_apply(bare, temperature=_temperature(config), deterministic=True)
    logprobs = jax.jit(lambda p, s: apply(p, s, jax.random.key(0))[0])
    # Without parameters of its own it is the base of the policy's adapters, which
    # every update gives away and hands back: only the newest state holds them.
    return lambda policy, rows: logprobs(
        policy.frozen if ref_params is None else ref_params, rows
    )


def digest(dataset: PromptDataset) -> str:
    """What a resumed run must find again: the prompts' ids and their rows."""
    found = hashlib.sha256(dataset.tokens.tobytes())
    found.update(dataset.lengths.tobytes())
    found.update(dataset.rows.tobytes())
    return found.hexdigest()
