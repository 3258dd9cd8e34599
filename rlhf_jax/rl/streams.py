"""Numbers of the random streams of an RL run, folded into its key.

    key = jax.random.fold_in(jax.random.key(seed), streams.SAMPLING)

The programs `rloo` and `ppo` and the run as one function, `algorithms.rloo_run`, share
them: given the same seed and arrays the two draw the same.
"""

SAMPLING = 1
"""Completions to learn from; the step is folded in after it."""
EVALUATION = 2
"""Completions of held-out prompts: the same noise every time."""
UPDATE = 3
"""Dropout of the updates."""
