"""One cell of the saturation grid: RLOO of several seeds at once, and what it did.

`open_bench` makes the two compiled functions that serve every cell, `runs` and `judge`,
both `vmap`ped over seeds: the cells differ in arrays alone, so each compiles once.
`measure` uses them. Texts are only made at the end, for the gold reward.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.algorithms import rloo_run
from rlhf_jax.algorithms.optimizer import make_optimizer, make_schedule
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
from rlhf_jax.programs.rloo import RlooConfig
from rlhf_jax.rl import streams
from rlhf_jax.sampling.generate import make_generate
from rlhf_jax.testbed.gold import gold_rewards
from rlhf_jax.types import PromptBatch, Rollout


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
    """(policy, reward models, prompts, keys) -> (policies, metrics), over seeds."""
    judge: Callable[..., Any]
    """(policies, reference, reward models, prompts, keys) -> Judged, over seeds."""

    def prompts(self, seed: int) -> PromptBatch:
        """[S B P], in the order of a run of the program with that seed."""
        order = Order(len(self.train.tokens), seed=seed, groups=self.groups)
        rows = np.reshape(
            order(0, self.steps * self.batch_size), (self.steps, self.batch_size)
        )
        return jax.tree.map(lambda x: x[rows], self.train)


def open_bench(config: RlooConfig, held_out: str) -> Bench:
    """The bench of an RLOO config: its policy's architecture, prompts and settings.

    Args:
        config: its reward, eval_data and shaping are not read.
        held_out: SPEC of the prompts that judge, a multiple of batch_size.
    """
    model, _, tokenizer = load_policy(config.model, compute=config.compute)
    encoder = prepare.make_encoder(tokenizer, config.rows)
    train, _ = prepare.prepare_prompts(config.data, encoder, config.rows)
    judges, _ = prepare.prepare_prompts([held_out], encoder, config.rows)
    listed = [judges[n] for n in range(len(judges))]
    both = _arrays([*(train[n] for n in range(len(train))), *listed], encoder.pad_id)
    runs, judge = _compiled(config, model, encoder.eos_id)
    return Bench(
        architecture=model.config,
        encoder=encoder,
        train=jax.tree.map(lambda x: x[: len(train)], both),
        groups=train.groups,
        held_out=listed,
        judged=jax.tree.map(
            lambda x: x[len(train) :].reshape(-1, config.batch_size, x.shape[1]), both
        ),
        steps=config.steps,
        batch_size=config.batch_size,
        runs=runs,
        judge=judge,
    )


def _compiled(
    config: RlooConfig, model: Llama, eos_id: int
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """runs and judge, see `Bench`."""
    policy = policy_apply(
        model, temperature=config.sampling.temperature, deterministic=True
    )
    act = rloo_run.make_act(
        make_generate(model, config.sampling, stop_ids=(eos_id,)),
        policy,
        reward_apply(RewardModel(model.config, config.compute), deterministic=True),
        eos_id=eos_id,
    )
    run = rloo_run.make_rloo_run(
        act,
        rloo_objective(policy, clip_eps=config.loss.clip_eps),
        make_optimizer(config.optimizer, make_schedule(config.optimizer, config.steps)),
        kl_coef=config.loss.kl_coef,
    )
    return (
        jax.jit(jax.vmap(run, in_axes=(None, 0, 0, 0))),
        jax.jit(jax.vmap(make_judge(act), in_axes=(0, None, 0, None, 0))),
    )


def _arrays(prompts: Sequence[EncodedPrompt], pad_id: int) -> PromptBatch:
    """All prompts in one width, that of the longest."""
    batch = xp.prompt_batch(prompts, pad_id=pad_id)
    longest = max(len(prompt.tokens) for prompt in prompts)
    return jax.tree.map(lambda x: x[:, :longest], batch)


def make_judge(act: rloo_run.Act) -> Callable[..., tuple[Rollout, Any, Any]]:
    """A pure function (policy, reference, reward model, prompts [N/B B P], key) ->
    (completions, their rewards [N G], metrics a batch); one batch after the other."""

    def judge(
        policy: Any, ref: Any, model: Any, prompts: PromptBatch, key: jax.Array
    ) -> tuple[Rollout, Any, Any]:
        def one(batch: tuple[PromptBatch, jax.Array]) -> tuple[Rollout, Any, Any]:
            scored = act(policy, ref, model, *batch)
            return scored.rollout, scored.rewards, rloo_run.measure(scored)

        keys = jax.random.split(key, len(prompts.tokens))
        rollout, rewards, metrics = jax.lax.map(one, (prompts, keys))
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (rollout, rewards))
        return *flat, metrics

    return judge


def measure(
    bench: Bench, policy: Any, models: Sequence[Any], seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """Numbers of each seed: RLOO from a policy under that seed's reward model.

    Args:
        bench: from `open_bench`.
        policy: parameters to start from.
        models: parameters of the reward models, one a seed.
        seeds: of the noise and the order of the prompts.

    Raises:
        FloatingPointError: an update was not finite; names seed and step.
    """
    stacked = stack(models)
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    noise = jax.vmap(lambda key: jax.random.fold_in(key, streams.EVALUATION))(keys)
    trained, curves = bench.runs(
        policy, stacked, stack([bench.prompts(seed) for seed in seeds]), keys
    )
    _check_finite(np.asarray(curves["update/finite"]), seeds)
    start = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(seeds), *x.shape)), policy)
    judged = {
        when: jax.device_get(bench.judge(params, policy, stacked, bench.judged, noise))
        for when, params in (("before", start), ("after", trained))
    }
    curves = jax.device_get(curves)
    return [
        _seed(
            bench,
            jax.tree.map(lambda x, n=n: x[n], curves),
            {k: jax.tree.map(lambda x, n=n: x[n], v) for k, v in judged.items()},
        )
        for n in range(len(seeds))
    ]


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
    for when, (rollout, rewards, metrics) in judged.items():
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
        bench.architecture, curves, [metrics for *_, metrics in judged.values()]
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
    architecture: LlamaConfig, curves: dict[str, Any], judged: Sequence[dict[str, Any]]
) -> dict[str, float]:
    """Tokens, and FLOPs by `train_flops`: a forward is a third of a training step.

    A step of RLOO is sampling, reference, reward model and update, so two of them;
    judging is the first three. Padding is not counted.
    """
    total = {name: float(np.sum(v)) for name, v in curves.items() if "count/" in name}
    flops = 2 * train_flops(
        architecture, tokens=total["count/tokens"], visible=total["count/visible"]
    )
    sampled = total["count/new_tokens"]
    for metrics in judged:
        sampled += float(np.sum(metrics["count/new_tokens"]))
        flops += train_flops(
            architecture,
            tokens=float(np.sum(metrics["count/tokens"])),
            visible=float(np.sum(metrics["count/visible"])),
        )
    return {"sampled": sampled, "trained": total["count/tokens"], "flops": flops}
