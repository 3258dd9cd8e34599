"""The tables of `rlhf-jax study seam-augment`."""

from typing import Any

from rich.table import Table

from rlhf_jax.studies.statistics import interval, paired

Found = list[dict[str, dict[str, float]]]
"""For each seed, arm -> number -> value."""

_PARTS: dict[str, tuple[str, dict[str, str]]] = {
    "policy": (
        "RLOO after augmentation",
        {
            "gold_before": "gold before RLOO",
            "gold": "gold after RLOO",
            "gain": "gain over the first SFT policy",
            "kl": "KL to its own start",
            "proxy_gain": "proxy gain, in its own deviations",
        },
    ),
    "pair": (
        "policy and reward model before RLOO",
        {
            "accuracy": "accuracy, held-out pairs",
            "accuracy_new": "of new prompts",
            "agreement": "agreement with gold on the policy's completions",
            "risk_lowest": "risk of the lowest prompts",
            "risk_others": "risk of others",
        },
    ),
}
_WHAT = ("policy", "reward model", "both")
_DIFFERENCES = {
    "gold": ("gold after RLOO", _WHAT),
    "kl": ("KL to its own start", _WHAT),
    "gold_before": ("gold before RLOO", ("policy",)),
    "accuracy": ("accuracy, held-out pairs", ("reward model",)),
    "accuracy_new": ("accuracy, new prompts", ("reward model",)),
    "agreement": ("agreement with gold", _WHAT),
    "risk_lowest": ("risk of the lowest prompts", _WHAT),
    "risk_others": ("risk of others", _WHAT),
}
"""Number -> (title, what it can differ with)."""


def table(found: Found, part: str) -> Table:
    """Means over seeds, a row an arm.

    Args:
        found: see `Found`.
        part: policy or pair.
    """
    title, columns = _PARTS[part]
    made = Table(title=f"{title}, {len(found)} seeds")
    made.add_column("added rows")
    for name in columns.values():
        made.add_column(name, justify="right")
    for arm in found[0]:
        values = ([result[arm][key] for result in found] for key in columns)
        made.add_row(arm, *(interval(each).plain() for each in values))
    return made


def difference_table(found: Found) -> Table:
    """Paired differences over seeds: random and guided rows against none, and guided
    against random."""
    made = Table(title=f"paired differences, {len(found)} seeds", show_lines=True)
    for name in ("", "added rows for", "random - none", "guided - none"):
        made.add_column(name)
    made.add_column("guided - random")
    for key, (title, concerned) in _DIFFERENCES.items():
        for what in concerned:
            none, random, guided = (
                [result[arm][key] for result in found]
                for arm in ("none", f"{what}, random", f"{what}, guided")
            )
            pairs: Any = ((random, none), (guided, none), (guided, random))
            cells = (str(paired(*each)) for each in pairs)
            made.add_row(title if what == concerned[0] else "", what, *cells)
    return made
