"""One cell of the saturation grid: RLOO of several seeds at once, and what it did.

`open_bench` makes the compiled functions that serve every cell: `runs`, `vmap`ped over
seeds, and `sample` and `score`, which judge one policy each. The cells differ in arrays
alone, so each compiles once. `begin` and `standardise` make what the cells of a policy
and of a reward model share; `measure` is a cell. Texts are only made at the end, for
the gold reward.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from rlhf_jax.algorithms import rloo_run
from rlhf_jax.algorithms.optimizer import (
    OptimizerConfig,
    make_optimizer,
    make_schedule,
)
from rlhf_jax.algorithms.policy import policy_apply
from rlhf_jax.algorithms.reward_model import reward_apply
from rlhf_jax.algorithms.rloo import rloo_objective
from rlhf_jax.data import prepare
from rlhf_jax.data.encode import Encoder
from rlhf_jax.data.encoded import EncodedPrompt
from rlhf_jax.data.iterate import Order
from rlhf_jax.evals.ranking import evaluate_ranking
from rlhf_jax.models.config import LlamaConfig
from rlhf_jax.models.flops import train_flops
from rlhf_jax.models.heads import RewardModel
from rlhf_jax.models.llama import Llama
from rlhf_jax.programs import experience as xp
from rlhf_jax.programs.models import load_policy
from rlhf_jax.rl import streams
from rlhf_jax.sampling.generate import SamplingConfig, make_generate
from rlhf_jax.studies.quickstart import UNROLLED
from rlhf_jax.testbed.gold import gold_rewards
from rlhf_jax.types import PromptBatch, Rollout

_SCALE = 4
"""Stream of the completions that set a reward model's scale; no program draws it."""


@struct.dataclass
class Standardised:
    """A reward model whose reward is (r - mean) / std."""

    params: Any
    mean: Float[Array, ""]
    std: Float[Array, ""]


@dataclasses.dataclass(frozen=True, eq=False)
class Start:
    """What the cells of one policy and seed share."""

    params: Any
    rollout: Rollout
    """Its completions of the held-out prompts, by batch."""


@dataclasses.dataclass(frozen=True, eq=False)
class Bench:
    """What all cells share."""

    architecture: LlamaConfig
    encoder: Encoder
    train: PromptBatch
    """All prompts to train on, [N P]."""
    groups: Any
    """Of their mixture, for their order."""
    held_out: list[EncodedPrompt]
    judged: PromptBatch
    """The held-out prompts in batches, [N/B B P]."""
    steps: int
    batch_size: int
    runs: Callable[..., Any]
    """(policies, reward models, prompts, keys) -> (policies, metrics), over seeds."""
    sample: Callable[..., Any]
    """(policy, prompts [N/B B P], key) -> completions, by batch."""
    score: Callable[..., Any]
    """(reference, reward model, prompts, completions, key) -> (rewards [N G], metrics a
    batch)."""

    def prompts(self, seed: int) -> PromptBatch:
        """[S B P], in the order of a run of the program with that seed."""
        order = Order(len(self.train.tokens), seed=seed, groups=self.groups)
        rows = np.reshape(
            order(0, self.steps * self.batch_size), (self.steps, self.batch_size)
        )
        return jax.tree.map(lambda x: x[rows], self.train)

    def scale_prompts(self) -> PromptBatch:
        """As many prompts as judge, of those to train on."""
        return jax.tree.map(
            lambda x, like: x[: like.shape[0] * like.shape[1]].reshape(like.shape),
            self.train,
            self.judged,
        )


def open_bench(
    model: str,
    *,
    data: list[str],
    held_out: str,
    steps: int,
    batch_size: int,
    kl_coef: float,
    num_samples: int,
    max_new_tokens: int,
    optimizer: OptimizerConfig,
) -> Bench:
    """The bench of RLOO as the paper has it, at temperature 1; the rest is not chosen.

    Args:
        model: a policy; its architecture and tokenizer are read.
        data: SPECs of the prompts to train on, at least as many as judge.
        held_out: SPEC of the prompts that judge, a multiple of batch_size.
        steps: of RLOO.
        batch_size: prompts of a step.
        kl_coef: standard deviations of reward per nat.
        num_samples: completions of a prompt.
        max_new_tokens: of a completion.
        optimizer: of the policy.
    """
    llama, _, tokenizer = load_policy(model, compute=UNROLLED)
    encoder = prepare.make_encoder(tokenizer)
    train, _ = prepare.prepare_prompts(data, encoder)
    judges, _ = prepare.prepare_prompts([held_out], encoder)
    if len(judges) % batch_size or len(judges) > len(train):
        raise ValueError(
            f"held_out {held_out}: {len(judges)} prompts; expected a multiple of "
            f"batch_size {batch_size}, and at most the {len(train)} to train on"
        )
    listed = [judges[n] for n in range(len(judges))]
    both = _arrays([*(train[n] for n in range(len(train))), *listed], encoder.pad_id)
    generate = make_generate(
        llama,
        SamplingConfig(num_samples=num_samples, max_new_tokens=max_new_tokens),
        stop_ids=(encoder.eos_id,),
    )
    tx = make_optimizer(optimizer, make_schedule(optimizer, steps))
    return Bench(
        architecture=llama.config,
        encoder=encoder,
        train=jax.tree.map(lambda x: x[: len(train)], both),
        groups=train.groups,
        held_out=listed,
        judged=jax.tree.map(
            lambda x: x[len(train) :].reshape(-1, batch_size, x.shape[1]), both
        ),
        steps=steps,
        batch_size=batch_size,
        **_compiled(llama, generate, tx, eos_id=encoder.eos_id, kl_coef=kl_coef),
    )


def _compiled(
    llama: Llama, generate: Any, tx: Any, *, eos_id: int, kl_coef: float
) -> dict[str, Callable[..., Any]]:
    """runs, sample and score, see `Bench`."""
    policy = policy_apply(llama, temperature=1.0, deterministic=True)
    reward = standardised(
        reward_apply(RewardModel(llama.config, UNROLLED), deterministic=True)
    )
    run = rloo_run.make_rloo_run(
        rloo_run.make_act(generate, policy, reward, eos_id=eos_id),
        rloo_objective(policy),
        tx,
        kl_coef=kl_coef,
    )
    score = rloo_run.make_score(policy, reward, eos_id=eos_id)
    return {
        "runs": jax.jit(jax.vmap(run)),
        "sample": jax.jit(make_sample(generate)),
        "score": jax.jit(by_batch(score)),
    }


def standardised(reward: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The reward of `Standardised` parameters.

    Args:
        reward: from `reward_apply`.
    """

    def apply(model: Standardised, *inputs: Any) -> jax.Array:
        return (reward(model.params, *inputs) - model.mean) / model.std

    return apply


def _arrays(prompts: Sequence[EncodedPrompt], pad_id: int) -> PromptBatch:
    """All prompts in one width, that of the longest."""
    batch = xp.prompt_batch(prompts, pad_id=pad_id)
    longest = max(len(prompt.tokens) for prompt in prompts)
    return jax.tree.map(lambda x: x[:, :longest], batch)


def make_sample(generate: Any) -> Callable[..., Rollout]:
    """A pure function (policy, prompts [N/B B P], key) -> completions, one batch after
    the other."""

    def sample(params: Any, prompts: PromptBatch, key: jax.Array) -> Rollout:
        keys = jax.random.split(key, len(prompts.tokens))
        return jax.lax.map(lambda one: generate(params, *one), (prompts, keys))

    return sample


def by_batch(score: rloo_run.Score) -> Callable[..., tuple[jax.Array, Any]]:
    """A pure function (reference, reward model, prompts [N/B B P], completions, key) ->
    (their rewards [N G], metrics a batch)."""

    def judge(
        ref: Any, model: Any, prompts: PromptBatch, rollout: Rollout, key: jax.Array
    ) -> tuple[jax.Array, Any]:
        def one(batch: tuple[PromptBatch, Rollout]) -> tuple[jax.Array, Any]:
            scored = score(ref, model, *batch, key)
            return scored.rewards, rloo_run.measure(scored)

        rewards, metrics = jax.lax.map(one, (prompts, rollout))
        return rewards.reshape(-1, rewards.shape[-1]), metrics

    return judge


def begin(bench: Bench, policy: Any, seed: int) -> Start:
    """A policy that RL starts from, and its completions, sampled once.

    Args:
        bench: from `open_bench`.
        policy: parameters.
        seed: of the noise.
    """
    return Start(policy, bench.sample(policy, bench.judged, _noise(seed)))


def draw_for_scale(bench: Bench, policy: Any, seed: int) -> Rollout:
    """Completions of training prompts, for `standardise`."""
    key = jax.random.fold_in(jax.random.key(seed), _SCALE)
    return bench.sample(policy, bench.scale_prompts(), key)


def standardise(
    bench: Bench, policy: Any, model: Any, rollout: Rollout
) -> Standardised:
    """A reward model whose rewards of some completions have mean 0 and deviation 1.

    Args:
        bench: from `open_bench`.
        policy: parameters of the policy that drew them.
        model: parameters of the reward model.
        rollout: from `draw_for_scale`.

    Raises:
        ValueError: all rewards are equal, or one is not finite.
    """
    raw = Standardised(model, jnp.zeros(()), jnp.ones(()))
    rewards, _ = _score(bench, policy, raw, bench.scale_prompts(), rollout)
    mean, std = float(rewards.mean()), float(rewards.std())
    if not std > 0 or not np.isfinite(std):
        raise ValueError(
            f"reward model: expected rewards of different size, got a standard "
            f"deviation of {std} over {rewards.size} completions; train it longer"
        )
    return Standardised(model, jnp.float32(mean), jnp.float32(std))


def _score(bench: Bench, *of: Any) -> tuple[jax.Array, Any]:
    """bench.score, which draws nothing: models without dropout take any key."""
    return bench.score(*of, jax.random.key(0))


def _noise(seed: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), streams.EVALUATION)


def measure(
    bench: Bench,
    starts: Sequence[Start],
    models: Sequence[Standardised],
    seeds: Sequence[int],
) -> list[dict[str, Any]]:
    """Numbers of each seed: RLOO from its policy under its reward model.

    Args:
        bench: from `open_bench`.
        starts: from `begin`, one a seed.
        models: from `standardise`, one a seed.
        seeds: of the noise and the order of the prompts.

    Raises:
        FloatingPointError: an update was not finite; names seed and step.
    """
    trained, curves = bench.runs(
        stack([start.params for start in starts]),
        stack(models),
        stack([bench.prompts(seed) for seed in seeds]),
        jnp.stack([jax.random.key(seed) for seed in seeds]),
    )
    curves = jax.device_get(curves)
    _check_finite(np.asarray(curves["update/finite"]), seeds)
    found = []
    for n, (start, model, seed) in enumerate(zip(starts, models, seeds, strict=True)):
        after, curve = jax.tree.map(lambda x, n=n: x[n], (trained, curves))
        drawn = bench.sample(after, bench.judged, _noise(seed))
        judged = {
            when: (rollout, *_score(bench, start.params, model, bench.judged, rollout))
            for when, rollout in (("before", start.rollout), ("after", drawn))
        }
        one = _seed(bench, curve, jax.device_get(judged))
        found.append(one | {"reward_std": float(model.std)})
    return found


def stack(trees: Sequence[Any]) -> Any:
    """The trees as one, with a leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _check_finite(finite: np.ndarray, seeds: Sequence[int]) -> None:
    bad = np.argwhere(finite < 1)
    if len(bad):
        seed, step = bad[0]
        raise FloatingPointError(
            f"seed {seeds[seed]}, step {step + 1}: a loss or gradient was not finite; "
            "lower the learning rate, or look at the reward model"
        )


def _seed(
    bench: Bench, curves: dict[str, np.ndarray], judged: dict[str, Any]
) -> dict[str, Any]:
    """The numbers of one seed, from its curves [S] and its completions."""
    found: dict[str, Any] = {}
    for when, (batches, rewards, metrics) in judged.items():
        rollout = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batches)
        texts = xp.as_texts(bench.held_out, rollout, bench.encoder)
        gold = np.array(gold_rewards(texts.prompts, texts.completions))
        by_prompt = list(gold.reshape(rewards.shape))
        ranking = evaluate_ranking(list(rewards), by_prompt, samples=2)
        found[when] = {
            "gold": float(gold.mean()),
            "proxy": float(rewards.mean()),
            "kl": float(metrics["policy/kl"].mean()),
            "length": float(metrics["completion/length"].mean()),
            "eos_rate": float(metrics["completion/eos_rate"].mean()),
            # None where gold ties all completions of every prompt.
            "mismatch": ranking.get("mismatch_rate"),
            "retokenised": _retokenised(bench.encoder, texts, rollout),
        }
    found["curves"] = {
        name: np.round(curves[name].astype(np.float64), 5).tolist()
        for name in ("reward/proxy", "policy/kl", "completion/length")
    }
    found["compute"] = _compute(
        bench.architecture, curves, judged["before"][2], judged["after"][2]
    )
    return found


def _retokenised(encoder: Encoder, texts: xp.Texts, rollout: Rollout) -> float:
    """Share of the completions whose text would be other ids: those that the reward
    model of the program would have read otherwise."""
    again = encoder.ids(
        [
            encoder.completion_pieces(prompt, text)
            for prompt, text in zip(texts.prompts, texts.completions, strict=True)
        ]
    )
    differs = []
    for row, ids in enumerate(again):
        length = int(rollout.mask[row].sum()) - int(rollout.stopped[row])
        differs.append(ids[:-1] != rollout.tokens[row, :length].tolist())
    return float(np.mean(differs))


def _compute(
    architecture: LlamaConfig,
    curves: dict[str, Any],
    before: dict[str, Any],
    after: dict[str, Any],
) -> dict[str, float]:
    """Tokens, and FLOPs by `train_flops`: a forward is a third of a training step.

    A step of RLOO is sampling, reference, reward model and update, so two of them;
    judging is the first three, without sampling before RL, where the completions are
    those of the policy's other cells. Padding is not counted.
    """

    def flops(metrics: dict[str, Any]) -> float:
        return train_flops(
            architecture,
            tokens=float(np.sum(metrics["count/tokens"])),
            visible=float(np.sum(metrics["count/visible"])),
        )

    new = [float(np.sum(each["count/new_tokens"])) for each in (curves, after)]
    return {
        "sampled": sum(new),
        "trained": float(np.sum(curves["count/tokens"])),
        "flops": 2 * flops(curves) + flops(after) + 2 / 3 * flops(before),
    }
