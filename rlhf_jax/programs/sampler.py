"""The jitted sampler of a program, and what a config must leave room for.

`open_sampler` is all of it for a program that only samples: model, tokenizer, mesh.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from rlhf_jax.data import prepare
from rlhf_jax.data.encode import Encoder
from rlhf_jax.data.encoded import EncodedPrompt
from rlhf_jax.models.llama import Llama
from rlhf_jax.programs import experience as xp
from rlhf_jax.programs import sharded
from rlhf_jax.programs.models import load_policy
from rlhf_jax.sampling.generate import make_generate
from rlhf_jax.sharding import batch_devices
from rlhf_jax.types import PromptBatch, Rollout


@dataclasses.dataclass(frozen=True, eq=False)
class Sampler:
    """A policy that continues prompts, some at a time."""

    encoder: Encoder
    prompt_limit: int
    """Tokens of a prompt that leave room for a completion."""
    together: int
    """Prompts of a batch."""
    mesh: jax.sharding.Mesh
    generate: Callable[[PromptBatch, jax.Array], Rollout]
    key: jax.Array

    def sample(
        self, prompts: Sequence[EncodedPrompt], number: int
    ) -> tuple[xp.Texts, Rollout]:
        """The completions of some prompts, G after G, on the host.

        Args:
            prompts: 1 .. `together`.
            number: folded into the key; what is drawn depends on it and on the places
                of the prompts.
        """
        # Filled up from the beginning: one number of rows compiles.
        batch = [prompts[n % len(prompts)] for n in range(self.together)]
        with jax.set_mesh(self.mesh):
            rollout = self.generate(
                xp.prompt_batch(batch, pad_id=self.encoder.pad_id),
                jax.random.fold_in(self.key, number),
            )
        rollout = jax.device_get(rollout)
        keep = len(rollout.tokens) // self.together * len(prompts)
        rollout = jax.tree.map(lambda x: x[:keep], rollout)
        return xp.as_texts(prompts, rollout, self.encoder), rollout


def open_sampler(config: Any, mesh: jax.sharding.Mesh) -> Sampler:
    """The sampler of a program.

    Args:
        config: of the program; its model, sampling, stop, rows, compute, batch_size and
            seed are read.
        mesh: of parameters and prompts.

    Raises:
        ValueError: no such model, several processes, no room for a prompt, or a stop
            string that is not one token.
    """
    one_process()
    with jax.set_mesh(mesh):
        model, params, tokenizer = load_policy(
            config.model, compute=config.compute, mesh=mesh
        )
    encoder = prepare.make_encoder(tokenizer, config.rows)
    generate, put = make_sampler(config, model, encoder), sharded.make_put(mesh)
    devices = batch_devices(mesh)
    return Sampler(
        encoder=encoder,
        prompt_limit=prompt_limit(config, model),
        together=-(-config.batch_size // devices) * devices,
        mesh=mesh,
        generate=lambda prompts, key: generate(params, put(prompts), key),
        key=jax.random.key(config.seed),
    )


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
