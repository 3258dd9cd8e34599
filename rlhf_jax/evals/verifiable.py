r"""Rewards that can be checked, for `--reward rlhf_jax.evals.verifiable:NAME`.

Each takes one completion and the column of the data row that it needs; see
`programs.rewards` for how columns reach a function.
"""

import re

_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")
_MARKED = re.compile(
    r"(?:####|answer\s*(?:is|:|=)|\\boxed\{)\s*\$?\s*(" + _NUMBER.pattern + ")",
    re.IGNORECASE,
)


def exact_number(completion: str, answer: str) -> float:
    r"""1 if the completion's final number is the answer, else 0.

    The final number is the last one that is marked (#### 72, "the answer is 72",
    "Answer: 72", \boxed{72}), or else the last number of all. Thousands separators and
    trailing zeros do not count.

    Args:
        completion: any text.
        answer: the right number, as text; GSM8K's form "... #### 72" will do too.

    Raises:
        ValueError: the answer holds no number.

    >>> exact_number("She sold 48 + 24 = 72 clips. The answer is 72.", "72")
    1.0
    >>> exact_number("About $1,000.50 in all.", "1000.5"), exact_number("None.", "3")
    (1.0, 0.0)
    """
    wanted = final_number(str(answer))
    if wanted is None:
        raise ValueError(f"answer {answer!r}: expected a number in it")
    return float(final_number(completion) == wanted)


def final_number(text: str) -> float | None:
    """The last marked number of a text, or else its last number; None without any."""
    found = _MARKED.findall(text) or _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None
