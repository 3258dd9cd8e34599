"""Attacks on a reward model: what `curation.seam.attack` searches, HotFlip proposes.

    adversary = open_adversary("runs/reward", ScoringConfig(), candidates=32)
    found = adversary.attack(prompts, golds, AttackConfig())

Tokens are the reward model's. A completion counts only if its text encodes to the very
tokens that were scored: what no text can say, no policy writes.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rlhf_jax.algorithms.hotflip import CHUNK, make_flips
from rlhf_jax.curation.seam.attack import Flip, Tokens, attack
from rlhf_jax.data import layout
from rlhf_jax.data.encode import Encoder
from rlhf_jax.data.encoded import EncodedCompletion
from rlhf_jax.data.plan import row_bucket
from rlhf_jax.data.texts import Texts
from rlhf_jax.programs import models
from rlhf_jax.programs.rewards import kind_of
from rlhf_jax.programs.scorer import (
    MADE_OF_MODELS,
    Refusal,
    Scorer,
    ScoringConfig,
    make_scorer,
)
from rlhf_jax.sharding import ShardingRules, batch_sharding, make_mesh


@dataclasses.dataclass(frozen=True)
class AttackConfig:
    """How a reward model is attacked."""

    count: int = 30
    """Completions kept of each prompt: those of the highest reward."""
    budget: float = 0.3
    """Largest share of a gold completion's tokens that may differ, at least one."""
    max_edits: int = 10
    """Most tokens that may differ, whatever the share; also the rounds of a search."""
    candidates: int = 32
    """Substitutions that are scored for each completion in a round."""
    beam: int = 1
    """Completions that a search goes on from; 1 is greedy."""

    def __post_init__(self) -> None:
        if not 0 < self.budget <= 1:
            raise ValueError(
                f"attack.budget: expected a share in (0, 1], got {self.budget}"
            )
        for name in ("count", "max_edits", "candidates", "beam"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"attack.{name}: expected at least 1, got {getattr(self, name)}"
                )


class Attacked(NamedTuple):
    """The edited completions of a prompt, or why there are none."""

    worse: list[dict[str, Any]]
    """text, source: "N edits", and "N edits, failed" where they do not raise the
    reward."""
    refusal: Refusal | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Adversary:
    """A reward model and the substitutions that its gradient proposes."""

    scorer: Scorer
    flips: Callable[..., Any]
    """Jitted (sequences, score_at [B], editable [B T]) -> Flips."""

    def attack(
        self,
        prompts: Sequence[Any],
        golds: Sequence[str],
        config: AttackConfig,
        tools: Sequence[list | None] | None = None,
    ) -> list[Attacked]:
        """Edited gold completions of each prompt, the highest reward first.

        Args:
            prompts: text or messages.
            golds: gold completion of each.
            config: budget and search.
            tools: tool descriptions of each, for the chat template.
        """
        encoder = self.scorer.encoder
        given = tools or [None] * len(prompts)
        rows = [{"tools": each} for each in given]
        encoded = self.scorer.encode_all(Texts(prompts, golds, rows))
        at = [n for n, found in enumerate(encoded) if not isinstance(found, Refusal)]
        mine = [found for found in encoded if not isinstance(found, Refusal)]
        starts = [tuple(int(i) for i in one.completion) for one in mine]
        shares = [max(1, round(config.budget * (len(start) - 1))) for start in starts]

        def says(index: int, tokens: Tokens) -> bool:
            text = encoder.completion_text(mine[index].prompt, list(tokens))
            place = at[index]
            return _encodes_to(encoder, prompts[place], text, tokens, given[place])

        found = attack(
            starts,
            self.scorer.rewards(mine).tolist() if mine else [],
            lambda asked: self._propose(mine, asked),
            budgets=[
                min(share, config.max_edits) if len(start) > 1 else 0
                for share, start in zip(shares, starts, strict=True)
            ],
            count=config.count,
            beam=config.beam,
            accept=says,
        )
        result = [
            Attacked([], one if isinstance(one, Refusal) else None) for one in encoded
        ]
        for n, completions in zip(at, found, strict=True):
            prompt = encoded[n].prompt  # type: ignore[union-attr]
            result[n].worse.extend(
                {
                    "text": encoder.completion_text(prompt, list(each.tokens)),
                    "source": f"{each.edits} edit" + "s" * (each.edits != 1) + note,
                }
                for some, note in zip(completions, ("", ", failed"), strict=True)
                for each in some
            )
        return result

    def _propose(
        self,
        encoded: Sequence[EncodedCompletion],
        asked: Sequence[tuple[int, Tokens]],
    ) -> list[list[Flip]]:
        """The flips of completions, scored in batches of rows of about equal length."""
        items = [EncodedCompletion(encoded[n].prompt, list(t)) for n, t in asked]
        lengths = np.array([len(i.prompt) + len(i.completion) for i in items])
        answers: list[list[Flip]] = [[] for _ in items]
        buckets = np.array([row_bucket(int(length)) for length in lengths])
        for size in np.unique(buckets).tolist():
            inside = np.flatnonzero(buckets == size)
            # CHUNK versions of every row are scored together.
            rows = max(self.scorer.tokens_per_batch // (size * CHUNK), 1)
            rows = -(-rows // self.scorer.rows_multiple_of)
            rows *= self.scorer.rows_multiple_of
            for start in range(0, len(inside), rows):
                some = inside[start : start + rows]
                found = self._batch([items[n] for n in some], rows, size)
                for n, flips in zip(some.tolist(), found, strict=True):
                    answers[n] = flips
        return answers

    def _batch(
        self, items: Sequence[EncodedCompletion], rows: int, size: int
    ) -> list[list[Flip]]:
        filled = [*items, *[items[0]] * (rows - len(items))]
        sequences, score_at, _ = layout.pack_completions(
            filled,
            layout="padded",
            row_length=size,
            rows=rows,
            pad_id=self.scorer.encoder.pad_id,
        )
        last = score_at[:, 0]
        editable = np.asarray(sequences.completion_mask) & (
            np.arange(size) != last[:, None]
        )
        with jax.set_mesh(self.scorer.mesh):
            flips = jax.device_get(self.flips(sequences, last, editable))
        return [
            [
                Flip(int(at) - len(item.prompt), int(token), float(reward))
                for at, token, reward in zip(
                    flips.position[b], flips.token[b], flips.flipped[b], strict=True
                )
                if np.isfinite(reward)
            ]
            for b, item in enumerate(items)
        ]


def open_adversary(spec: str, config: ScoringConfig, *, candidates: int) -> Adversary:
    """The adversary of a reward model.

    Args:
        spec: a reward model, as in `models`; its gradient is needed, so no
            function, ensemble or reward of attributes.
        config: how it reads texts.
        candidates: substitutions scored for each completion in a round.

    Raises:
        ValueError: no such model, or one without a reward head.
    """
    if kind_of(spec) != "model" or spec.startswith(MADE_OF_MODELS):
        raise ValueError(
            f"reward {spec}: an attack follows the gradient of one reward model; "
            "expected a run directory, a Hugging Face directory, a hub id or a .gguf"
        )
    if not (models.resolve(spec).reward or config.untrained_head):
        raise ValueError(
            f"reward {spec}: it has no reward head; train one with `rlhf-jax reward`"
        )
    mesh, rules = make_mesh(config.mesh), ShardingRules()
    with jax.set_mesh(mesh):
        model, params, tokenizer = models.load_reward_model(
            spec, compute=config.compute, mesh=mesh, rules=rules
        )
    where = batch_sharding(mesh, rules)
    score = jax.jit(lambda params, *batch: model.apply({"params": params}, *batch))
    flips = jax.jit(make_flips(model, count=candidates))
    allowed = _allowed(tokenizer, model.config.vocab_size)

    def score_fn(sequences: Any, score_at: Any) -> Any:
        return score(params, *jax.device_put((sequences, score_at), where))

    def flips_of(*rows: Any) -> Any:
        return flips(params, *jax.device_put(rows, where), allowed)

    return Adversary(make_scorer(score_fn, tokenizer, model.config, config), flips_of)


def _allowed(tokenizer: Any, vocab_size: int) -> np.ndarray:
    """[V] ordinary tokens that are whole characters that one can see, or spaces."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    allowed = np.zeros(vocab_size, bool)
    for n in range(min(vocab_size, len(tokenizer))):
        text = tokenizer.decode([n])
        seen = text.replace("\n", " ").isprintable()
        whole = bool(text) and "\N{REPLACEMENT CHARACTER}" not in text
        allowed[n] = seen and whole and n not in special
    return allowed


def _encodes_to(
    encoder: Encoder, prompt: Any, text: str, tokens: Tokens, tools: list | None
) -> bool:
    try:
        found = encoder.completion(prompt, text, tools=tools)
        return tuple(int(n) for n in found) == tokens
    except ValueError:
        return False
