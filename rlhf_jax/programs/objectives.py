"""Losses and regularizers by name: `[COEFFICIENT*]NAME[?OPTION=VALUE[&OPTION=VALUE]]`.

    hinge?min_gap=0.5
    1e-3*batch_sum_to_zero?scale=official&num_groups=devices
    my_package.losses:focal?gamma=2

NAME is a function of `losses.preference` or `losses.regularizers`, or
package.module:function; the options are its keyword-only numbers and words. `resolve`
makes the function of a text, `check` does so without a mesh, before anything is loaded.
"""

import difflib
import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

import numpy as np

from rlhf_jax import config as configs
from rlhf_jax.losses import preference, regularizers
from rlhf_jax.types import PAIR_COLUMNS

LOSSES: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        preference.bradley_terry,
        preference.hinge,
        preference.normalised,
        preference.direct,
        preference.scaled_bradley_terry,
        preference.rao_kupper,
    )
}
REGULARIZERS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        regularizers.batch_sum_to_zero,
        regularizers.centring,
        regularizers.squared_rewards,
        regularizers.bounded_gap,
    )
}
_PAPERS = {
    "bt": "bradley_terry",
    "dr": "direct",
    "eurus": "direct",
    "norm": "normalised",
    "bsr": "batch_sum_to_zero",
    "l2": "squared_rewards",
    "pcrm": "bounded_gap",
    "ties": "rao_kupper",
}
"""What papers call them; for the hint beside an unknown name."""
COUPLED = (regularizers.batch_sum_to_zero,)
"""Regularizers whose value depends on all pairs of a batch."""
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "label_smoothing": (lambda x: 0 <= x <= 1, "a number in [0, 1]"),
    "eps": (lambda x: x > 0, "a number above 0"),
    "log_theta": (lambda x: x > 0, "a number above 0"),
}
"""Options of the named functions: what they may be. The functions refuse the rest too,
but only when they are traced."""


def loss(text: str) -> Callable[..., Any]:
    """The loss that a text names, with its options filled in.

    Raises:
        ValueError: the text does not follow the grammar, or an unknown name or option,
            with the nearest known one.
    """
    coefficient, function = _resolve(text, "loss", LOSSES, {})
    if coefficient != 1.0:
        raise ValueError(f"loss {text!r}: a loss has no coefficient; drop it")
    return function


def regularizer(text: str, *, devices: int = 1) -> tuple[Callable[..., Any], float]:
    """(function, coefficient) of a text; the word `devices` as an option's value is the
    number of devices and micro-batches that a batch is cut into.

    Raises:
        ValueError: see `loss`.
    """
    words = {"devices": devices}
    coefficient, function = _resolve(text, "regularizers", REGULARIZERS, words)
    return function, coefficient


def parts(
    loss_text: str,
    regularizer_texts: Sequence[str],
    *,
    devices: int = 1,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """The arguments `loss` and `regularizers` of `reward_model.reward_objective`.

    Args:
        loss_text: see `loss`.
        regularizer_texts: see `regularizer`.
        devices: see `regularizer`.
        batch_size: pairs in a step; None = the groups of a batch are not checked.

    Raises:
        ValueError: see `loss`; or a number of groups that does not fit the batch.
    """
    if batch_size is not None:
        for text in regularizer_texts:
            _check_groups(text, batch_size, devices=devices)
    return {
        "loss": loss(loss_text),
        "regularizers": [regularizer(t, devices=devices) for t in regularizer_texts],
    }


def parts_of_evaluation(
    loss_text: str, regularizer_texts: Sequence[str]
) -> dict[str, Any]:
    """`parts` without the regularizers of COUPLED: evaluation sets come in other
    batches, and a value over those would mean something else."""
    coupled = {function.__name__ for function in COUPLED}
    kept = [t for t in regularizer_texts if _name(t) not in coupled]
    return parts(loss_text, kept)


def couples(text: str) -> bool:
    """Whether a loss or a regularizer needs the whole batch at once: the named ones
    that do, and every function of the user's own."""
    known, name = LOSSES | REGULARIZERS, _name(text)
    return name not in known or known[name] in COUPLED


def _name(text: str) -> str:
    """Without coefficient and options."""
    return text.partition("?")[0].rpartition("*")[2]


def check(
    loss_text: str,
    regularizer_texts: Sequence[str],
    *,
    columns: Mapping[str, str | None],
    batch_size: int,
) -> None:
    """Refuses names, options and combinations that cannot work.

    Args:
        loss_text: see `loss`.
        regularizer_texts: see `regularizer`.
        columns: the names of the data's pair columns, None = not used.
        batch_size: pairs in a step.

    Raises:
        ValueError: says which of them, and what to do.
    """
    functions = [loss(loss_text), *(regularizer(t)[0] for t in regularizer_texts)]
    for name in PAIR_COLUMNS:
        parameters = [inspect.signature(f).parameters for f in functions]
        takes = [p for p in parameters if name in p or _takes_all(p)]
        if columns[name] is not None and not takes:
            raise ValueError(
                f"rows.columns.{name} {columns[name]!r}: neither loss {loss_text!r} "
                "nor a regularizer uses it; take the column out, or choose one that "
                "does"
            )
        needing = [
            text
            for text, p in zip((loss_text, *regularizer_texts), parameters)
            if name in p and p[name].default is p[name].empty
        ]
        if columns[name] is None and needing:
            raise ValueError(
                f"{needing[0]!r}: needs the column {name}; name it with "
                f"--rows.columns.{name}"
            )
    for text in regularizer_texts:
        _check_groups(text, batch_size)
    coupled = [text for text in regularizer_texts if couples(text)]
    if coupled and batch_size < 2:
        raise ValueError(
            f"regularizers {coupled[0]!r}: couples the pairs of a batch, and "
            f"batch_size is {batch_size}; use 2 or more, or centring, which is what it "
            "would be"
        )


def check_margins(loss_text: str, *datasets: Any) -> None:
    """Refuses margins below 0 where the loss multiplies by them: it would reward a
    wrong order without bound.

    Args:
        loss_text: see `loss`.
        datasets: of pairs, with the margins that the loss will get.

    Raises:
        ValueError: names the row with the lowest margin of the first such dataset.
    """
    if LOSSES.get(_name(loss_text)) is not preference.scaled_bradley_terry:
        return
    for dataset in datasets:
        if (dataset.margin < 0).any():
            row = int(np.argmin(dataset.margin))
            raise ValueError(
                f"{dataset.where[row]}: margin {dataset.margin[row]}: loss "
                "scaled_bradley_terry multiplies by it; expected numbers >= 0"
            )


def _check_groups(text: str, batch_size: int, *, devices: int = 1) -> None:
    options = getattr(regularizer(text, devices=devices)[0], "keywords", {})
    groups = options.get("num_groups", 1)
    if groups != 1 and (groups < 1 or batch_size % groups or batch_size // groups < 2):
        word = f" (devices times accum_steps: {devices})" if "=devices" in text else ""
        raise ValueError(
            f"regularizers {text!r}: num_groups {groups}{word}: expected a number that "
            f"divides the {batch_size} pairs of a batch into groups of 2 or more; a "
            "group of one pair is centring"
        )


def _resolve(
    text: str,
    flag: str,
    known: Mapping[str, Callable[..., Any]],
    words: Mapping[str, int],
) -> tuple[float, Callable[..., Any]]:
    match = re.fullmatch(r"(?:([^?*]+)\*)?([^?*]+)(?:\?(.+))?", text)
    if match is None:
        raise ValueError(
            f"{flag} {text!r}: expected [COEFFICIENT*]NAME[?OPTION=VALUE&...]"
        )
    number, name, query = match.groups()
    if name in known:
        function = known[name]
    elif ":" in name:
        function = configs.load_function(name, f"--{flag}")
    else:
        near = _PAPERS.get(name.lower()) or next(
            iter(difflib.get_close_matches(name, known, n=1, cutoff=0.4)), None
        )
        hint = f"did you mean {near!r}? " if near in known else ""
        raise ValueError(
            f"{flag} {text!r}: unknown name; {hint}expected one of {', '.join(known)}, "
            "or package.module:function"
        )
    options = _options(text, flag, function, query or "", words)
    for option, value in options.items() if name in known else ():
        holds, expected = _RANGES.get(option, (None, ""))
        if holds is not None and not holds(value):
            raise ValueError(
                f"{flag} {text!r}: {option}: expected {expected}, got {value}"
            )
    return (
        _number(text, flag, number),
        functools.partial(function, **options) if options else function,
    )


def _number(text: str, flag: str, number: str | None) -> float:
    try:
        value = 1.0 if number is None else float(number)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ValueError(
            f"{flag} {text!r}: expected a finite coefficient >= 0 before the *, got "
            f"{number!r}"
        )
    return value


def _options(
    text: str,
    flag: str,
    function: Callable[..., Any],
    query: str,
    words: Mapping[str, int],
) -> dict[str, Any]:
    parameters = {
        name: p
        for name, p in inspect.signature(function, eval_str=True).parameters.items()
        if p.kind is p.KEYWORD_ONLY and name not in PAIR_COLUMNS
    }
    options: dict[str, Any] = {}
    for item in query.split("&") if query else []:
        name, separator, value = item.partition("=")
        if not separator or not value:
            raise ValueError(f"{flag} {text!r}: expected OPTION=VALUE, got {item!r}")
        if name not in parameters:
            known = ", ".join(parameters) or "none"
            raise ValueError(
                f"{flag} {text!r}: unknown option {name!r}; its options: {known}"
            )
        what, kind = f"{flag} {text!r}: {name}", _kind(parameters[name])
        options[name] = (
            words[value]
            if kind is int and value in words
            else _value(what, value, kind)
        )
    return options


def _kind(parameter: inspect.Parameter) -> Any:
    """The type of an option: as annotated, or that of its default."""
    if parameter.annotation is not parameter.empty:
        return parameter.annotation
    return type(parameter.default)


def _value(what: str, value: str, kind: Any) -> Any:
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError(
                f"{what}: expected one of {', '.join(get_args(kind))}, got {value!r}"
            )
        return value
    if kind is str:
        return value
    if kind is bool:
        if value not in ("true", "false"):
            raise ValueError(f"{what}: expected true or false, got {value!r}")
        return value == "true"
    if kind not in (int, float):
        raise ValueError(
            f"{what}: its type is not known; annotate the argument as int, float, "
            "bool, str or a Literal, or give it a default of one of these"
        )
    try:
        number = kind(value)
    except ValueError:
        number = float("nan")
    if not abs(number) < float("inf"):
        expected = "a whole number" if kind is int else "a finite number"
        raise ValueError(f"{what}: expected {expected}, got {value!r}")
    return number


def _takes_all(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in parameters.values())
