"""SEAM, the seamlessness of policy and reward model (arXiv:2406.07971).

Read in this order: scores (what is measured, and which prompts are lowest), contrast,
perturb, attack (where worse completions come from), augment (what is made of them). The
published code stops short of the formula: `scores` says which choices are ours.
"""
