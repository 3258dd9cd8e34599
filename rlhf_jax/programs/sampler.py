"""The jitted sampler of a program, and what a config must leave room for."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from rlhf_jax.data.encode import Encoder
from rlhf_jax.models.llama import Llama
from rlhf_jax.sampling.generate import make_generate
from rlhf_jax.types import Rollout


def make_sampler(config: Any, model: Llama, encoder: Encoder) -> Callable[..., Rollout]:
    """Jitted (params, PromptBatch, key) -> Rollout.

    Args:
        config: of the program; its sampling and stop are read.
        model: of the parameters.
        encoder: names the end token.

    Raises:
        ValueError: a stop string that is not one token.
    """
    # Weights whole along the model width: sharded, they would be gathered at every
    # token.
    rules = dataclasses.replace(model.rules, embed=None)
    return jax.jit(
        make_generate(
            model, config.sampling, stop_ids=_stop_ids(config, encoder), rules=rules
        )
    )


def _stop_ids(config: Any, encoder: Encoder) -> tuple[int, ...]:
    """The end token of the template and the tokens that config.stop names."""
    ids = [encoder.eos_id]
    for text in config.stop:
        found = encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(found) != 1:
            raise ValueError(
                f"stop {text!r}: expected one token of the tokenizer, got {len(found)}"
            )
        ids.append(found[0])
    return tuple(dict.fromkeys(ids))


def prompt_limit(config: Any, model: Llama) -> int:
    """Tokens of a prompt that leave room for a completion."""
    longest = min(config.rows.max_length, model.config.max_position_embeddings)
    room = longest - config.sampling.max_new_tokens
    if room < 1:
        raise ValueError(
            f"sampling.max_new_tokens {config.sampling.max_new_tokens}: leaves no room "
            f"for a prompt in {longest} tokens (rows.max_length and the model's "
            "max_position_embeddings); lower it, or raise rows.max_length"
        )
    return min(room, config.rows.max_prompt_length or room)


def one_process() -> None:
    """Refuses several processes: each would build the whole batch as its slice.

    Raises:
        ValueError: jax runs in more than one process.
    """
    if jax.process_count() > 1:
        raise ValueError(
            f"sampling runs in one process, jax has {jax.process_count()}; use the "
            "devices of one host"
        )
