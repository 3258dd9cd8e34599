"""SEAM, the seamlessness of policy and reward model (arXiv:2406.07971).

Read in this order: scores (what is measured), contrast, perturb (where worse
completions come from), select (what is done with it). The published code stops short of
the formula: `scores` says which choices are ours.
"""
