"""Which PPO, and what its updates aim at: advantages and returns of completions.

`make_targets` is the loop's `targets`: scores are normalised, the KL taken off at every
token, the rest is generalised advantage estimation; it moves the running moments and
the KL controller, which live in the cursor.
"""

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
import numpy as np

from rlhf_jax.algorithms import ppo
from rlhf_jax.losses.value import explained_variance
from rlhf_jax.programs import experience as xp
from rlhf_jax.programs.reinforcement import RLCursor
from rlhf_jax.rl import kl_controller, moments

NORMALISERS = {"scale": moments.scale, "normalise": moments.normalise}


@dataclasses.dataclass(frozen=True)
class PpoLossConfig:
    """Which PPO."""

    clip_eps: float = 0.2
    """Ratios are clipped to 1 - eps .. 1 + eps."""
    dual_clip: float | None = None
    """Bound on the loss of tokens with a negative advantage; null = none."""
    value_clip: float | None = 0.2
    """Values are clipped to within this of the old ones in the loss; null = not."""
    gamma: float = 1.0
    """Discount."""
    gae_lambda: float = 0.95
    """Lambda of generalised advantage estimation."""
    kl_coef: float = 0.02
    """Reward per nat of KL, taken off at every token."""
    kl_target: float | None = None
    """KL of a completion, in nats, that kl_coef is adapted to; null = kl_coef is
    fixed."""
    kl_horizon: int = 10_000
    """Completions over which the adaptation acts."""
    scores: Literal["raw", "scale", "normalise"] = "scale"
    """Scores as they are, over their running standard deviation, or less their running
    mean too."""
    score_clip: float | None = None
    """Then within +- this; null = as they are."""
    whiten: bool = True
    """Advantages of mean 0 and variance 1 over the step."""
    advantage_clip: float | None = None
    """Then within +- this; null = as they are."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    ptx_coef: float = 0.0
    """Weight of the loss on supervised rows (ptx_data)."""
    critic_warmup: int = 0
    """Steps at the start in which only the critic learns."""

    def __post_init__(self) -> None:
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"loss.{name}: expected a number in [0, 1], got "
                    f"{getattr(self, name)}"
                )
        for name in ("kl_coef", "entropy_coef", "ptx_coef", "critic_warmup"):
            if not getattr(self, name) >= 0:
                raise ValueError(
                    f"loss.{name}: expected at least 0, got {getattr(self, name)}"
                )
        for name in ("value_clip", "kl_target", "score_clip", "advantage_clip"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(
                    f"loss.{name}: expected a number above 0 or null, got {value}"
                )
        if not 0 < self.clip_eps <= 1:
            raise ValueError(
                f"loss.clip_eps: expected a number in (0, 1], got {self.clip_eps}"
            )
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(
                f"loss.dual_clip: expected a number above 1 or null, got "
                f"{self.dual_clip}"
            )


def make_targets(
    loss: PpoLossConfig, completions: xp.Completions, cursor: RLCursor
) -> tuple[xp.Completions, dict[str, float]]:
    """Advantages and returns; moves the running moments and the KL controller."""
    counts = jnp.asarray(completions.counts)
    mask = jnp.asarray(completions.mask) & counts[:, None]
    scores = jnp.asarray(completions.scores)
    if loss.scores != "raw":
        count, mean, m2 = (jnp.float32(x) for x in cursor.moments)
        seen = moments.RunningMoments(count=count, mean=mean, m2=m2)
        seen = moments.update(seen, scores, counts)
        cursor.moments = (float(seen.count), float(seen.mean), float(seen.m2))
        scores = NORMALISERS[loss.scores](scores, seen, clip=loss.score_clip)
    elif loss.score_clip is not None:
        scores = jnp.clip(scores, -loss.score_clip, loss.score_clip)
    distance = jnp.asarray(completions.kl, jnp.float32)
    targets = ppo.ppo_targets(
        scores,
        distance,
        jnp.asarray(completions.values),
        mask,
        kl_coef=cursor.kl_coef,
        gamma=loss.gamma,
        gae_lambda=loss.gae_lambda,
        whiten=loss.whiten,
        clip_advantage=loss.advantage_clip,
    )
    metrics = {
        "policy/kl_coef": cursor.kl_coef,
        "value/explained_variance": float(
            explained_variance(jnp.asarray(completions.values), targets.returns, mask)
        ),
    }
    away = float(distance.sum(axis=1).mean())
    # A KL that is nan must not stay in the controller after its step was dropped.
    if loss.kl_target is not None and math.isfinite(away):
        cursor.kl_coef = float(
            kl_controller.adaptive(
                cursor.kl_coef,
                away,
                target=loss.kl_target,
                horizon=loss.kl_horizon,
                count=len(completions.scores),
            )
        )
    done = dataclasses.replace(
        completions,
        advantages=np.asarray(targets.advantages),
        returns=np.asarray(targets.returns),
    )
    return done, metrics
