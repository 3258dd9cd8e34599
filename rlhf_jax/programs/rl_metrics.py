"""What `rloo` and `ppo` say of sampled completions: metrics, and rows to be read."""

from typing import Any

import numpy as np

from rlhf_jax.data.texts import Texts
from rlhf_jax.programs import experience as xp
from rlhf_jax.types import Rollout


def measure(
    completions: xp.Completions,
    rollout: Rollout,
    total: np.ndarray,
    columns: dict[str, np.ndarray],
    gold: np.ndarray | None,
) -> dict[str, float]:
    """Metrics of sampled completions, before any update."""
    mask = completions.mask
    k1 = completions.kl
    k3 = np.where(mask, np.expm1(-k1) + k1, 0.0)
    found = {
        "reward/proxy": total.mean(),
        "reward/proxy_std": total.std(),
        "reward/score": completions.scores.mean(),
        "policy/kl": k1.sum(axis=1).mean(),
        "policy/kl_k3": k3.sum(axis=1).mean(),
        "policy/kl_token": k1.sum() / mask.sum(),
        "policy/logprob": np.asarray(rollout.policy_logprobs).sum(axis=1).mean(),
        "completion/length": mask.sum(axis=1).mean(),
        "completion/eos_rate": completions.stopped.mean(),
        "completion/repetition": repetition(completions.tokens, mask),
        "completion/counted": completions.counts.mean(),
    }
    if len(columns) > 1:
        # Not reward/NAME: a source may be called score, proxy or gold.
        found |= {
            f"reward/source/{name}": scores.mean() for name, scores in columns.items()
        }
    if gold is not None:
        found["reward/gold"] = gold.mean()
        if gold.std() > 0 and total.std() > 0:
            found["reward/gold_correlation"] = np.corrcoef(gold, total)[0, 1]
    return {name: float(value) for name, value in found.items()}


def named(metrics: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Metrics of an update, its own (loss, grad_norm, update/finite) under a prefix."""
    own = ("loss", "grad_norm", "update/finite")
    return {f"{prefix}/{k}" if k in own else k: v for k, v in metrics.items()}


def repetition(tokens: np.ndarray, mask: np.ndarray, *, n: int = 3) -> float:
    """Mean share of a completion's n-grams that occurred in it before."""
    shares = []
    for row, real in zip(tokens, mask):
        ids = row[real].tolist()
        grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return float(np.mean(shares))


def sample_rows(
    texts: Texts,
    completions: xp.Completions,
    total: np.ndarray,
    columns: dict[str, np.ndarray],
    gold: np.ndarray | None,
) -> list[dict]:
    """What is kept to be read: a row for the first completion of each prompt."""
    kl = completions.kl.sum(axis=1)
    rows = []
    for m in range(0, len(total), completions.num_samples):
        row = {
            "prompt": texts.prompts[m],
            "completion": texts.completions[m],
            "reward": float(total[m]),
            "kl": float(kl[m]),
            "tokens": int(completions.mask[m].sum()),
            "stopped": bool(completions.stopped[m]),
        }
        if len(columns) > 1:
            row["rewards"] = {name: float(c[m]) for name, c in columns.items()}
        if gold is not None:
            row["gold"] = float(gold[m])
        rows.append(row)
    return rows
