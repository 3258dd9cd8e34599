"""The maths of PPO and RLOO outside the losses: arrays in, arrays out, no gradient.

Read `shaping` (scores and KL -> rewards), then `gae` (PPO) or `baselines` (RLOO), then
`moments` and `kl_controller`, the two things that change from batch to batch. Results
are constants under differentiation; what is differentiated lives in losses. Imports
jax, and losses.masked of the package. Prompts are the batch rows B here, and [B G]
flattened is [M].
"""
