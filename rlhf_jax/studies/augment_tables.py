"""The tables of `rlhf-jax study seam-augment`."""

from typing import Any

from rich.table import Table

from rlhf_jax.studies.statistics import Interval, interval, paired

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
            "risk_lowest": "risk of lowest prompts without rows",
            "risk_others": "risk of others without rows",
        },
    ),
}
_ROWS = {
    "lowest": "lowest prompts",
    "not_misjudged": "of them without a misjudged completion",
    "guided_pairs": "guided pairs",
    "random_pairs": "random pairs",
    "texts_in_rows": "share of the texts of the risk that are in some added row",
}
"""Number of a seed's added rows -> title."""
PRIMARY = ("gold", "both")
"""The comparison that has a p value: of guided with random rows."""
_WHAT = ("policy", "reward model", "both")
_DIFFERENCES = {
    "gold": ("gold after RLOO", _WHAT),
    "kl": ("KL to its own start", _WHAT),
    "gold_before": ("gold before RLOO", ("policy",)),
    "accuracy": ("accuracy, held-out pairs", ("reward model",)),
    "accuracy_new": ("accuracy, new prompts", ("reward model",)),
    "agreement": ("agreement with gold", _WHAT),
    "risk_lowest": ("risk, lowest prompts without rows", _WHAT),
    "risk_others": ("risk, others without rows", _WHAT),
}
"""Number -> (title, what it can differ with)."""


def row_table(found: list[dict[str, float]]) -> Table:
    """What was added, a row a seed.

    Args:
        found: numbers of each seed.
    """
    made = Table(title="added rows")
    made.add_column("seed", justify="right")
    for name in _ROWS.values():
        made.add_column(name, justify="right")
    for seed, numbers in enumerate(found):
        made.add_row(str(seed), *(f"{numbers[key]:g}" for key in _ROWS))
    return made


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
    against random. Only the primary comparison is tested."""
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
            cells = [paired(*each) for each in pairs]
            shown = [str(Interval(each.mean, each.half)) for each in cells]
            if (key, what) == PRIMARY:
                shown[-1] = str(cells[-1])
            made.add_row(title if what == concerned[0] else "", what, *shown)
    made.caption = "95 % intervals over seeds. p: the primary comparison, gold after "
    made.caption += "RLOO with both taught, guided against random rows; the others are "
    made.caption += "not tested"
    return made
