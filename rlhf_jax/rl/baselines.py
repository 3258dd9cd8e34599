"""The leave-one-out baseline over the samples of one prompt.

A sample that does not count (a truncated completion left out by the config, a filler
row) gets no advantage, is absent from the others' baselines and, through `usable`, from
the mean of the loss: all three or none.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def leave_one_out(
    rewards: Float[Array, "B G"], counts: Bool[Array, "B G"]
) -> Float[Array, "B G"]:
    """How much better each sample is than the mean of the other samples of its prompt.

    A_i = R_i - 1/(k-1) sum_{j != i} R_j = k/(k-1) (R_i - mean_j R_j)

    i and j run over the k counted samples of the prompt.

    Args:
        rewards: R, [B G], one per sampled completion.
        counts: [B G], False leaves a sample out; see `usable`.

    Returns:
        [B G] float32, without gradient; 0 where not `usable`, and exactly 0 where all
        counted rewards of a prompt are equal.

    Source: Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!";
    Ahmadian et al. 2024, arXiv:2402.14740; Hong et al. 2025, arXiv:2505.07271 (k = 2).

    >>> import jax.numpy as jnp
    >>> print(leave_one_out(jnp.array([[1.0, 4.0, 1.0]]), jnp.ones((1, 3), bool)))
    [[-1.5  3.  -1.5]]
    """
    rewards = rewards.astype(jnp.float32)
    # Measured from the largest: equal rewards then differ by exactly 0, and a large
    # common offset does not eat the digits of the differences.
    top = jnp.max(jnp.where(counts, rewards, -jnp.inf), axis=1, keepdims=True)
    below = jnp.where(counts, rewards - top, 0.0)
    others = jnp.sum(counts, axis=1, keepdims=True, dtype=jnp.float32) - 1
    rest = jnp.sum(below, axis=1, keepdims=True) - below
    advantages = below - rest / jnp.maximum(others, 1)
    return jax.lax.stop_gradient(jnp.where(usable(counts), advantages, 0.0))


def usable(counts: Bool[Array, "B G"]) -> Bool[Array, "B G"]:
    """True for the samples that carry weight: counted, and not alone in their group.

    Args:
        counts: [B G], False leaves a sample out.

    Returns:
        [B G]: the mask of the mean over the losses of samples.

    Source: definition of the baseline: a sample alone has none.
    """
    return counts & (jnp.sum(counts, axis=1, keepdims=True) >= 2)
