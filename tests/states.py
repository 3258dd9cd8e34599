"""States of the preset `tiny`, one sequence a row: what packed rows must give too."""

import jax
import numpy as np

from rlhf_jax.programs.models import load_reward_model
from rlhf_jax.types import Sequences


def slow_states(sequences):
    """The state after the final norm at the last token of each, [N D] float64; the
    model's seed is 3."""
    model, params, _ = load_reward_model("tiny", key=jax.random.key(3))
    length = max(map(len, sequences))
    tokens, segment = np.zeros((2, len(sequences), length), np.int32)
    for row, ids in enumerate(sequences):
        tokens[row, : len(ids)], segment[row, : len(ids)] = ids, 1
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    rows = Sequences(
        tokens=tokens,
        positions=positions,
        segment=segment,
        completion_mask=segment > 0,
    )
    last = np.array([[len(ids) - 1] for ids in sequences])
    _, after = model.apply({"params": params}, rows, last, method="states")
    return np.asarray(after[:, 0], np.float64)
