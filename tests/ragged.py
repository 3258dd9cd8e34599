"""Ragged completions full of random numbers, a policy that is a table, and its loops.

`ragged` and `table_apply` serve the tests of RLOO and PPO: the same completions go
through the package's rows of any layout and through plain loops in float64.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data.plan import LAYOUTS
from rlhf_jax.programs.experience import Completions, Packing, experience, pack_alike

__all__ = ["LAYOUTS", "batch_of", "packing", "ragged", "table_apply", "table_logprob"]

VOCAB = 20
GARBAGE = 1e3
"""What arrays hold where no token is."""


def ragged(prompts=4, samples=3, *, length=6, seed=0, **changes):
    """Completions of 1 to `length` tokens with fractional and negative scores."""
    rng = np.random.default_rng(seed)
    total = prompts * samples
    lengths = rng.integers(1, length + 1, total)
    lengths[:2] = [length, 1][:total]  # both ends occur
    mask = np.arange(length) < lengths[:, None]
    stopped = (lengths < length) | (rng.uniform(size=total) < 0.5)
    prompt_lengths = rng.integers(1, 6, prompts)

    def numbers(scale, shift=0.0):
        values = rng.normal(size=mask.shape) * scale + shift
        return np.where(mask, values, GARBAGE).astype(np.float32)

    old = numbers(0.4, -0.7)
    fields = {
        "prompt_tokens": rng.integers(0, VOCAB, prompt_lengths.sum()).astype(np.int32),
        "prompt_lengths": prompt_lengths.astype(np.int64),
        "tokens": rng.integers(0, VOCAB, mask.shape).astype(np.int32),
        "mask": mask,
        "stopped": stopped,
        "old_logprobs": old,
        "ref_logprobs": np.where(mask, old + numbers(0.3), -GARBAGE),
        "scores": (rng.normal(size=total) * 1.7 - 0.3).astype(np.float32),
        "counts": np.ones(total, bool),
        "advantages": np.zeros(total, np.float32),
        "values": numbers(0.8),
        "returns": np.zeros(mask.shape, np.float32),
    }
    fields["ref_logprobs"] = fields["ref_logprobs"].astype(np.float32)
    return Completions(**fields | changes)


def packing(layout="shared", row_length=24):
    """Rows in which groups of `ragged` are sometimes torn apart."""
    return Packing(
        layout=layout, row_length=row_length, rows_multiple_of=1, pad_id=VOCAB - 1
    )


def batch_of(completions, layout="shared", members=None):
    """All completions, or some, as one Experience of jax arrays."""
    if members is None:
        members = np.arange(len(completions.tokens))
    [packed] = pack_alike(completions, [members], packing(layout))
    batch = experience(completions, members, packed)
    return dataclasses.replace(batch, **{
        f.name: jax.tree.map(jnp.asarray, getattr(batch, f.name))
        for f in dataclasses.fields(batch)
    })  # fmt: skip


def table(seed=0):
    """Parameters of `table_apply`."""
    return {"w": jax.random.normal(jax.random.key(seed), (VOCAB,)) * 0.5}


def table_apply(params, sequences, key):
    """A policy whose log-probabilities depend on token and position alone.

    What it says where no completion is would be noticed in any sum.
    """
    scale = 1 + 0.1 * sequences.positions.astype(jnp.float32)
    logprobs = jax.nn.log_sigmoid(params["w"][sequences.tokens] * scale)
    entropy = 0.3 * params["w"][sequences.tokens] ** 2 * scale
    real = sequences.completion_mask
    return jnp.where(real, logprobs, GARBAGE), jnp.where(real, entropy, GARBAGE)


def table_logprob(params, completions, m, t):
    """What `table_apply` says of token t of completion m, in float64."""
    w = float(params["w"][completions.tokens[m, t]])
    prompt = completions.prompt_lengths[m // completions.num_samples]
    return -np.log1p(np.exp(-w * (1 + 0.1 * (prompt + t))))


def table_entropy(params, completions, m, t):
    """The entropy beside it, in float64."""
    w = float(params["w"][completions.tokens[m, t]])
    prompt = completions.prompt_lengths[m // completions.num_samples]
    return 0.3 * w**2 * (1 + 0.1 * (prompt + t))


def real_tokens(completions, counts=None):
    """(m, t) of every token of every completion that counts."""
    counts = completions.counts if counts is None else counts
    return [
        (m, t)
        for m in range(len(completions.tokens))
        for t in range(completions.mask.shape[1])
        if completions.mask[m, t] and counts[m]
    ]
