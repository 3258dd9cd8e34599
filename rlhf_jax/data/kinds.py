"""The kinds of rows that are prepared: pairs, conversations, prompts, K-wise rows.

A `Kind` says what of a row is encoded, which encoded rows are set aside and why, and
what is kept of the others; `DataConfig` has the limits and policies. `prepare` runs
them over data.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Generic, Literal, TypeVar

import numpy as np

from rlhf_jax.data import rows as shapes
from rlhf_jax.data.encode import Encoder
from rlhf_jax.data.kwise import KwiseDataset
from rlhf_jax.data.pieces import Pieces
from rlhf_jax.data.plan import LAYOUTS
from rlhf_jax.data.rows import Columns
from rlhf_jax.data.store import (
    ConversationDataset,
    PairDataset,
    PromptDataset,
    flatten,
    json_bytes,
)
from rlhf_jax.types import PAIR_COLUMNS


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """How rows are read, encoded, checked and laid out."""

    template: str = "tokenizer"
    """Chat template: tokenizer (its own; plain text if it has none), plain, or the path
    of a jinja file."""
    columns: Columns = Columns()
    """Column names; margin, soft_label, gap_bound and weight are used only if named
    here."""
    max_length: int = 1024
    """Tokens of prompt and answer together, at most."""
    max_prompt_length: int | None = None
    """Tokens of the prompt, at most; null = max_length decides."""
    over_long: Literal["drop", "error", "truncate_prompt"] = "drop"
    """Rows above the limits: set aside, stop, or cut the oldest tokens of the
    prompt."""
    identical: Literal["drop", "error"] = "drop"
    """Pairs with chosen == rejected."""
    empty: Literal["drop", "error"] = "drop"
    """Rows with an empty prompt or answer."""
    malformed: Literal["drop", "error"] = "error"
    """Rows that cannot be read or used."""
    turns: Literal["all", "last"] = "all"
    """Assistant turns of a conversation that SFT trains on."""
    layout: Literal["shared", "packed", "padded"] = "shared"
    """Rows of a batch: several [prompt | chosen | rejected] blocks, several sequences,
    or one padded sequence. SFT packs where this says shared."""
    row_length: int | None = None
    """Tokens of a row; null = fit for the dataset."""
    num_shapes: int = 3
    """Row counts that packed batches of training take, at most: each is a compilation,
    and fewer of them mean more padding."""
    cache_dir: str | None = None
    """Folder for tokenised rows; null = none."""

    def __post_init__(self) -> None:
        for name in ("max_length", "max_prompt_length", "row_length", "num_shapes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"rows.{name}: expected at least 1, got {value}")
        if self.layout not in LAYOUTS:
            raise ValueError(
                f"rows.layout: expected one of {', '.join(LAYOUTS)}, got "
                f"{self.layout!r}"
            )

    def policy(self, reason: str) -> str:
        """What happens to rows with this reason."""
        return getattr(self, reason)


D = TypeVar("D", PairDataset, ConversationDataset, PromptDataset, KwiseDataset)


@dataclasses.dataclass(frozen=True)
class Kind(Generic[D]):
    """What differs between the kinds."""

    name: str
    pieces: Callable[[dict[str, Any], Encoder, DataConfig], tuple[list[Pieces], Any]]
    """Row -> texts to encode, and the record. Raises ValueError."""
    check: Callable[[list[Any], DataConfig], tuple[list[Any], tuple[str, str] | None]]
    """Encoded texts -> those to keep (prompts cut), or (reason, detail)."""
    arrays: Callable[[list[Any]], dict[str, np.ndarray]]
    """(encoded, record) of the kept rows -> what is cached."""
    dataset: Callable[..., D]


# Pairs.


def _pair_pieces(
    row: dict[str, Any], encoder: Encoder, config: DataConfig
) -> tuple[list[Pieces], Any]:
    pair = shapes.pair_row(row, config.columns)
    texts = [pair.chosen, pair.rejected]
    return encoder.answer_pieces(pair.prompt, texts, tools=pair.tools), pair


def _check_pair(
    ids: list[Any], config: DataConfig
) -> tuple[list[Any], tuple[str, str] | None]:
    (prompt, mask), (chosen, _), (rejected, _) = ids
    for name, ids_of in (("chosen", chosen), ("rejected", rejected)):
        if len(ids_of) < 2:
            return ids, ("empty", f"{name} has nothing before its end token")
    if chosen == rejected:
        return ids, (
            "identical",
            f"chosen and rejected are the same {len(chosen)} tokens",
        )
    answer = max(len(chosen), len(rejected))
    problem = _too_long(len(prompt), answer, config)
    if problem is None or config.over_long != "truncate_prompt":
        return ids, None if problem is None else ("over_long", problem)
    room = min(
        config.max_length - answer, config.max_prompt_length or config.max_length
    )
    if room < 2:
        return ids, (
            "over_long",
            f"{problem}, and the answers leave no room for a prompt",
        )
    return [([prompt[0], *prompt[1 - room :]], mask[:room]), *ids[1:]], None


def _too_long(prompt: int, answer: int, config: DataConfig) -> str | None:
    if config.max_prompt_length is not None and prompt > config.max_prompt_length:
        return (
            f"prompt of {prompt} tokens > max_prompt_length {config.max_prompt_length}"
        )
    if prompt + answer > config.max_length:
        return (
            f"prompt of {prompt} + answer of {answer} = {prompt + answer} tokens > "
            f"max_length {config.max_length}"
        )
    return None


def _pair_arrays(kept: list[Any]) -> dict[str, np.ndarray]:
    ids = [part for encoded, _ in kept for part, _ in encoded]
    arrays = {
        "tokens": flatten(ids),
        "lengths": np.array([len(part) for part in ids], np.int64).reshape(-1, 3),
        "weight": np.array([pair.weight for _, pair in kept], np.float32),
    }
    for name in PAIR_COLUMNS:
        values = [getattr(pair, name) for _, pair in kept]
        if values and values[0] is not None:
            arrays[name] = np.array(values, np.float32)
    return arrays


# Conversations.


def _conversation_pieces(
    row: dict[str, Any], encoder: Encoder, config: DataConfig
) -> tuple[list[Pieces], Any]:
    record = shapes.conversation_row(row, config.columns)
    if record.messages is not None:
        pieces = encoder.conversation_pieces(
            record.messages, turns=config.turns, tools=record.tools
        )
        return [pieces], record
    assert record.prompt is not None and record.completion is not None
    prompt, answer = encoder.answer_pieces(
        record.prompt, [record.completion], tools=record.tools
    )
    asked = (False,) * len(prompt.written) if config.turns == "last" else prompt.written
    texts, written = prompt.texts + answer.texts, asked + answer.written
    return [Pieces(texts, written, ends=True)], record


def _check_conversation(
    ids: list[Any], config: DataConfig
) -> tuple[list[Any], tuple[str, str] | None]:
    tokens, mask = ids[0]
    if sum(mask) < 2:
        return ids, ("empty", "the answer has nothing before its end token")
    prompt = mask.index(True)
    problem = _too_long(prompt, len(tokens) - prompt, config)
    return ids, None if problem is None else ("over_long", problem)


def _conversation_arrays(kept: list[Any]) -> dict[str, np.ndarray]:
    tokens = [encoded[0][0] for encoded, _ in kept]
    masks = [np.asarray(encoded[0][1], bool) for encoded, _ in kept]
    return {
        "tokens": flatten(tokens),
        "completion_mask": np.concatenate(masks) if masks else np.zeros(0, bool),
        "lengths": np.array([len(part) for part in tokens], np.int64),
    }


# Prompts.


def _prompt_pieces(
    row: dict[str, Any], encoder: Encoder, config: DataConfig
) -> tuple[list[Pieces], Any]:
    record = shapes.prompt_row(row, config.columns)
    pieces = encoder.prompt_pieces(record.prompt, tools=record.tools)
    return [pieces], {"prompt": record.prompt, "row": row}


def _check_prompt(
    ids: list[Any], config: DataConfig
) -> tuple[list[Any], tuple[str, str] | None]:
    prompt, mask = ids[0]
    limit = config.max_prompt_length or config.max_length
    if len(prompt) <= limit:
        return ids, None
    if config.over_long == "truncate_prompt" and limit > 1:
        return [([prompt[0], *prompt[1 - limit :]], mask[:limit])], None
    return ids, ("over_long", f"prompt of {len(prompt)} tokens > {limit}")


def _prompt_arrays(kept: list[Any]) -> dict[str, np.ndarray]:
    tokens = [encoded[0][0] for encoded, _ in kept]
    rows, sizes = json_bytes([record for _, record in kept])
    return {
        "tokens": flatten(tokens),
        "lengths": np.array([len(part) for part in tokens], np.int64),
        "rows": rows,
        "row_sizes": sizes,
    }


# K-wise rows, and completions without labels.


def _kwise_pieces(
    row: dict[str, Any], encoder: Encoder, config: DataConfig, *, scored: bool = True
) -> tuple[list[Pieces], Any]:
    record = shapes.kwise_row(row, config.columns, scored=scored)
    texts = [response.text for response in record.responses]
    pieces = encoder.answer_pieces(record.prompt, texts, tools=record.tools)
    return pieces, [response.score for response in record.responses]


def _check_kwise(
    ids: list[Any], config: DataConfig
) -> tuple[list[Any], tuple[str, str] | None]:
    (prompt, _), *answers = ids
    for number, (answer, _) in enumerate(answers, 1):
        if len(answer) < 2:
            return ids, ("empty", f"response {number} has nothing before its end token")
    longest = max(len(answer) for answer, _ in answers)
    problem = _too_long(len(prompt), longest, config)
    return ids, None if problem is None else ("over_long", problem)


def _kwise_arrays(kept: list[Any], *, scored: bool = True) -> dict[str, np.ndarray]:
    ids = [part for encoded, _ in kept for part, _ in encoded]
    arrays = {
        "tokens": flatten(ids),
        "part_lengths": np.array([len(part) for part in ids], np.int64),
        "counts": np.array([len(encoded) - 1 for encoded, _ in kept], np.int64),
    }
    # `_concatenate` skips specs of which nothing is left by their lengths.
    arrays["lengths"] = arrays["counts"]
    if scored:
        scores = [score for _, record in kept for score in record]
        arrays["scores"] = np.array(scores, np.float32)
    return arrays


def _kwise_dataset(*, lengths: np.ndarray, **fields: Any) -> KwiseDataset:
    del lengths
    return KwiseDataset(**fields)


KWISE = Kind("kwise", _kwise_pieces, _check_kwise, _kwise_arrays, _kwise_dataset)
RESPONSES = Kind(
    "responses",
    functools.partial(_kwise_pieces, scored=False),
    _check_kwise,
    functools.partial(_kwise_arrays, scored=False),
    _kwise_dataset,
)
PROMPTS = Kind("prompts", _prompt_pieces, _check_prompt, _prompt_arrays, PromptDataset)
PAIRS = Kind("pairs", _pair_pieces, _check_pair, _pair_arrays, PairDataset)
CONVERSATIONS = Kind(
    "conversations",
    _conversation_pieces,
    _check_conversation,
    _conversation_arrays,
    ConversationDataset,
)
