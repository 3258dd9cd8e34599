"""Sampling: (params, prompts, key) -> Rollout, and the warping of one distribution."""
