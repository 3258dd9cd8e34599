"""LLaMA-style models: architecture, attention backends, heads, LoRA, checkpoints.

Read config.py, then block.py from the bottom up and llama.py; attention.py holds the
visibility rule, heads.py the reward and value models, parameters.py the sharding of
every parameter.
"""
