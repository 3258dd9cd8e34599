"""One cell of the saturation grid: RLOO of several seeds at once, and what it did.

`begin` and `standardise` make what the cells of a policy and of a reward model share;
`measure` is a cell, on the compiled functions of `saturation_bench`. Texts are only
made at the end, for the gold reward.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data.encode import Encoder
from rlhf_jax.data.texts import Texts
from rlhf_jax.evals.ranking import evaluate_ranking
from rlhf_jax.models.config import LlamaConfig
from rlhf_jax.models.flops import train_flops
from rlhf_jax.programs import experience as xp
from rlhf_jax.rl import streams
from rlhf_jax.studies.saturation_bench import Bench, Standardised
from rlhf_jax.testbed.gold import gold_rewards
from rlhf_jax.types import Rollout

_SCALE = 4
"""Stream of the completions that set a reward model's scale; no program draws it."""


@dataclasses.dataclass(frozen=True, eq=False)
class Start:
    """What the cells of one policy and seed share."""

    params: Any
    rollout: Rollout
    """Its completions of the held-out prompts, by batch."""


def begin(bench: Bench, policy: Any, seed: int) -> Start:
    """A policy that RL starts from, and its completions, sampled once.

    Args:
        bench: see `saturation_bench`.
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
        bench: see `saturation_bench`.
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
        bench: see `saturation_bench`.
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


def _retokenised(encoder: Encoder, texts: Texts, rollout: Rollout) -> float:
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
