"""Losses on pairs of rewards: [Q] rewards in, [Q] losses out, no reduction.

Every function has the signature f(chosen_rewards, rejected_rewards, *,
hyper-parameters), so that any of them, or a user's own, goes into
`algorithms.reward_model.reward_objective`. `margin` and `soft_label` are columns of the
data, one value a pair; the other hyper-parameters are numbers. Throughout,
d = r_chosen - r_rejected. Losses of K responses at once are in `ranking`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def bradley_terry(
    chosen_rewards: Float[Array, "Q"],
    rejected_rewards: Float[Array, "Q"],
    *,
    margin: Float[Array, "Q"] | None = None,
    soft_label: Float[Array, "Q"] | None = None,
    label_smoothing: float = 0.0,
) -> Float[Array, "Q"]:
    """Negative log-likelihood of the preference under the Bradley-Terry model.

    loss = -[p log sigmoid(d - m) + (1 - p) log sigmoid(-(d - m))]

    Args:
        chosen_rewards: [Q] rewards of the preferred completions.
        rejected_rewards: [Q] rewards of the others.
        margin: m, [Q], in units of reward; None = 0.
        soft_label: [Q] in [0, 1], the probability that the chosen one is better; None
            = 1.
        label_smoothing: alpha in [0, 1]: p = (1 - alpha) soft_label
            + alpha (1 - soft_label).

    Returns:
        [Q] losses in nats, float32, finite for finite rewards.

    Raises:
        ValueError: shapes differ: [Q] against [Q, 1] would broadcast to [Q, Q] pairs;
            label_smoothing outside [0, 1].

    Source: Bradley & Terry 1952; Ouyang et al. 2022, arXiv:2203.02155, eq. 1; the
    margin as Touvron et al. 2023, arXiv:2307.09288, eq. 2, and Wang et al. 2024,
    arXiv:2401.06080, eq. 6 (which prints m outside the sigmoid, where it would have no
    gradient); smoothing ibid., eq. 5.

    >>> import jax.numpy as jnp
    >>> print(bradley_terry(jnp.zeros(1), jnp.zeros(1)))
    [0.6931472]
    """
    if not 0 <= label_smoothing <= 1:
        raise ValueError(
            f"label_smoothing: expected a number in [0, 1], got {label_smoothing}"
        )
    gap = _gap(chosen_rewards, rejected_rewards, margin=margin, soft_label=soft_label)
    if margin is not None:
        gap = gap - margin
    if soft_label is None and label_smoothing == 0.0:
        return jax.nn.softplus(-gap)
    p = jnp.ones_like(gap) if soft_label is None else soft_label
    p = (1 - label_smoothing) * p + label_smoothing * (1 - p)
    return p * jax.nn.softplus(-gap) + (1 - p) * jax.nn.softplus(gap)


def hinge(
    chosen_rewards: Float[Array, "Q"],
    rejected_rewards: Float[Array, "Q"],
    *,
    margin: Float[Array, "Q"] | None = None,
    min_gap: float = 1.0,
) -> Float[Array, "Q"]:
    """The amount by which the gap falls short: max(0, min_gap + m - d).

    Args:
        chosen_rewards: [Q].
        rejected_rewards: [Q].
        margin: m, [Q], a pair's own addition to the gap asked for; None = 0.
        min_gap: the gap asked of every pair; at 0 a pair has no gradient once it is
            ordered.

    Returns:
        [Q] losses in units of reward, float32.

    Source: Hong et al. 2025, arXiv:2505.07271, baseline BT-Hinge, whose published code
    has min_gap 0 and whose paper does not state it.

    >>> import jax.numpy as jnp
    >>> print(hinge(jnp.array([2.0, 0.0]), jnp.array([0.0, 0.0])))
    [0. 1.]
    """
    gap = _gap(chosen_rewards, rejected_rewards, margin=margin)
    wanted = min_gap if margin is None else min_gap + margin
    return jax.nn.relu(wanted - gap)


def normalised(
    chosen_rewards: Float[Array, "Q"],
    rejected_rewards: Float[Array, "Q"],
    *,
    eps: float = 1e-6,
) -> Float[Array, "Q"]:
    """Bradley-Terry on the pair's rewards divided by their Euclidean norm.

    loss = softplus(-d / sqrt(r_chosen^2 + r_rejected^2 + eps))

    The quotient is at most sqrt(2), so the loss stays above 0.2176 and the rewards'
    scale is free.

    Args:
        chosen_rewards: [Q].
        rejected_rewards: [Q].
        eps: added under the root: without it the gradient at two zero rewards, where a
            fresh head can start, is nan.

    Returns:
        [Q] losses in nats, float32.

    Raises:
        ValueError: eps is not above 0.

    Source: Wei et al. 2022, arXiv:2205.09310 (LogitNorm), as the baseline BT-Norm of
    Hong et al. 2025, arXiv:2505.07271. Differs from the published code: eps.

    >>> import jax.numpy as jnp
    >>> print(normalised(jnp.array([1e4]), jnp.array([-1e4])))
    [0.21762]
    """
    if eps <= 0:
        raise ValueError(f"eps: expected a number above 0, got {eps}")
    gap = _gap(chosen_rewards, rejected_rewards)
    # Scaled first: the square of 1e30 is not a float32.
    largest = jnp.maximum(jnp.abs(chosen_rewards), jnp.abs(rejected_rewards))
    scale = jax.lax.stop_gradient(jnp.maximum(largest.astype(jnp.float32), 1.0))
    chosen, rejected = chosen_rewards / scale, rejected_rewards / scale
    norm = scale * jnp.sqrt(chosen**2 + rejected**2 + eps / scale**2)
    return jax.nn.softplus(-gap / norm)


def direct(
    chosen_rewards: Float[Array, "Q"], rejected_rewards: Float[Array, "Q"]
) -> Float[Array, "Q"]:
    """Bradley-Terry plus terms that ask for positive and negative rewards (Eurus).

    loss = -log sigmoid(d) - log sigmoid(r_chosen) - log sigmoid(-r_rejected)

    Args:
        chosen_rewards: [Q].
        rejected_rewards: [Q].

    Returns:
        [Q] losses in nats, float32.

    Source: Yuan et al. 2024, arXiv:2404.02078, L_BT + L_DR; the baseline BT-DR of Hong
    et al. 2025, arXiv:2505.07271. Differs from the published code, which takes the
    logarithm of a sigmoid and is infinite at large rewards.

    >>> import jax.numpy as jnp
    >>> print(direct(jnp.zeros(1), jnp.zeros(1)))
    [2.0794415]
    """
    gap = _gap(chosen_rewards, rejected_rewards)
    absolute = jax.nn.softplus(-chosen_rewards.astype(jnp.float32)) + jax.nn.softplus(
        rejected_rewards.astype(jnp.float32)
    )
    return jax.nn.softplus(-gap) + absolute


def scaled_bradley_terry(
    chosen_rewards: Float[Array, "Q"],
    rejected_rewards: Float[Array, "Q"],
    *,
    margin: Float[Array, "Q"],
) -> Float[Array, "Q"]:
    """Bradley-Terry with each pair's loss multiplied by its preference strength.

    loss = -m log sigmoid(d)

    Args:
        chosen_rewards: [Q].
        rejected_rewards: [Q].
        margin: m, [Q], >= 0: how much better the chosen one was judged to be.

    Returns:
        [Q] losses, float32. Their mean over the batch is not divided by the strengths:
        pairs of strength 2 pull twice as hard as pairs of strength 1.

    Source: Wang et al. 2024, arXiv:2410.01257 (HelpSteer2-Preference), "scaled BT".

    >>> import jax.numpy as jnp
    >>> print(scaled_bradley_terry(jnp.zeros(1), jnp.zeros(1), margin=jnp.array([3.0])))
    [2.0794415]
    """
    gap = _gap(chosen_rewards, rejected_rewards, margin=margin)
    return margin * jax.nn.softplus(-gap)


def rao_kupper(
    chosen_rewards: Float[Array, "Q"],
    rejected_rewards: Float[Array, "Q"],
    *,
    soft_label: Float[Array, "Q"] | None = None,
    log_theta: float = 0.5,
) -> Float[Array, "Q"]:
    """Negative log-likelihood of a win, a tie or a loss.

    P(win)  = sigmoid(d - log theta)
    P(tie)  = (theta^2 - 1) sigmoid(d - log theta) sigmoid(-d - log theta)
    P(loss) = sigmoid(-d - log theta)

    The three add up to 1. A pair with soft_label p counts as a win with weight
    max(2p - 1, 0), as a loss with weight max(1 - 2p, 0), and as a tie otherwise: 0.5
    marks a tie.

    Args:
        chosen_rewards: [Q].
        rejected_rewards: [Q].
        soft_label: p, [Q] in [0, 1]; None = 1, no ties.
        log_theta: log theta > 0, the half-width of the indifference, in units of
            reward.

    Returns:
        [Q] losses in nats, float32.

    Raises:
        ValueError: log_theta is not above 0, so that ties would be impossible.

    Source: Rao & Kupper 1967; Liu et al. 2024, arXiv:2410.05328, eq. 5 (BTT).

    >>> import jax.numpy as jnp
    >>> r = jnp.zeros(2)
    >>> print(rao_kupper(r, r, soft_label=jnp.array([1.0, 0.5])))
    [0.974077  1.4069961]
    """
    if log_theta <= 0:
        raise ValueError(
            f"log_theta: expected a number above 0, got {log_theta}; at 0 no tie is "
            "possible and the loss is bradley_terry"
        )
    gap = _gap(chosen_rewards, rejected_rewards, soft_label=soft_label)
    win, loss = jax.nn.softplus(log_theta - gap), jax.nn.softplus(log_theta + gap)
    if soft_label is None:
        return win
    tie = win + loss - jnp.log(jnp.expm1(2.0 * log_theta))
    sure = jnp.abs(2 * soft_label - 1)
    decided = jnp.where(soft_label > 0.5, win, loss)
    return sure * decided + (1 - sure) * tie


def _gap(
    chosen_rewards: jax.Array,
    rejected_rewards: jax.Array,
    **columns: jax.Array | None,
) -> jax.Array:
    """d in float32, after a check that nothing would broadcast."""
    arrays = {"chosen_rewards": chosen_rewards, "rejected_rewards": rejected_rewards}
    shapes = {name: x.shape for name, x in (arrays | columns).items() if x is not None}
    if len(set(shapes.values())) > 1:
        raise ValueError(
            "expected one value a pair in each array, got shapes "
            + ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        )
    return chosen_rewards.astype(jnp.float32) - rejected_rewards.astype(jnp.float32)
