"""Contrastive losses between two views of the same items: [N D] twice in, [N] out.

The views are hidden states of one batch under two dropout masks. All items of the batch
are each other's negatives, so these losses couple the batch. Items of weight 0 are
filler: they are nobody's negative and their loss must be ignored.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def simcse(
    first: Float[Array, "N D"],
    second: Float[Array, "N D"],
    weight: Float[Array, "N"],
    *,
    temperature: float = 0.05,
) -> Float[Array, "N"]:
    """How badly each item finds itself among all items of the other view.

    loss_i = -log softmax_j( cos(h_i, h'_j) / temperature )[i]

    Args:
        first: h, [N D].
        second: h', [N D].
        weight: [N]; 0 = filler.
        temperature: of the softmax; the paper does not state it, this is SimCSE's.

    Returns:
        [N] losses in nats, float32.

    Source: Gao et al. 2021, arXiv:2104.08821, eq. 1; Wang et al. 2024,
    arXiv:2401.06080, eq. 9.
    """
    logits = (
        jnp.einsum("nd,md->nm", unit(first), unit(second), precision="highest")
        / temperature
    )
    counted = (weight > 0)[None, :] | jnp.eye(len(weight), dtype=bool)
    pool = jax.nn.logsumexp(logits, axis=1, where=counted)
    return pool - jnp.diagonal(logits)


def swav(
    first: Float[Array, "N D"],
    second: Float[Array, "N D"],
    prototypes: Float[Array, "K D"],
    weight: Float[Array, "N"],
    *,
    temperature: float = 0.1,
    epsilon: float = 0.05,
    iterations: int = 3,
) -> Float[Array, "N"]:
    """Each view predicts the cluster that the other one was assigned to.

    loss_i = l(h_i, q'_i) + l(h'_i, q_i)
    l(h, q) = -sum_k q_k log softmax_k( h . c_k / temperature )

    with h and the prototypes c at unit length and q the assignments of `sinkhorn`,
    which get no gradient.

    Args:
        first: h, [N D].
        second: h', [N D].
        prototypes: c, [K D], trained with the model.
        weight: [N]; 0 = filler.
        temperature: of the softmax.
        epsilon: of Sinkhorn; smaller = harder assignments.
        iterations: of Sinkhorn.

    Returns:
        [N] losses in nats, float32.

    Source: Caron et al. 2020, arXiv:2006.09882, eq. 1-2, with its temperature, epsilon
    and iterations; Wang et al. 2024, arXiv:2401.06080, eq. 7-8.
    """
    centres = unit(prototypes)
    scores = [
        jnp.einsum("nd,kd->nk", unit(h), centres, precision="highest")
        for h in (first, second)
    ]
    assigned = [
        jax.lax.stop_gradient(
            sinkhorn(s, weight, epsilon=epsilon, iterations=iterations)
        )
        for s in scores
    ]
    guessed = [jax.nn.log_softmax(s / temperature, axis=1) for s in scores]
    return -jnp.sum(assigned[1] * guessed[0] + assigned[0] * guessed[1], axis=1)


def sinkhorn(
    scores: Float[Array, "N K"],
    weight: Float[Array, "N"],
    *,
    epsilon: float = 0.05,
    iterations: int = 3,
) -> Float[Array, "N K"]:
    """Soft assignments of N items to K clusters of equal size; each row sums to 1.

    Alternately normalises the columns and the rows of exp(scores / epsilon), in
    logarithms, and ends with the rows.

    Args:
        scores: [N K].
        weight: [N]; an item of weight 0 takes no room in a cluster.
        epsilon: see `swav`.
        iterations: see `swav`.

    Source: Cuturi 2013, arXiv:1306.0895; Caron et al. 2020, arXiv:2006.09882, eq. 3-4.
    """
    log_q = scores.astype(jnp.float32) / epsilon
    counted = (weight > 0)[:, None]
    any_counted = counted | ~jnp.any(counted)
    for _ in range(iterations):
        full = jax.nn.logsumexp(log_q, axis=0, keepdims=True, where=any_counted)
        log_q = jax.nn.log_softmax(log_q - full, axis=1)
    return jnp.exp(log_q)


def unit(x: Float[Array, "... D"], *, eps: float = 1e-12) -> Float[Array, "... D"]:
    """x / |x| in float32; the zero vector stays zero and has a finite gradient.

    Args:
        x: any leading axes.
        eps: added under the root.

    Source: definition.
    """
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + eps)
