"""Worse completions written on request: by a local policy or an endpoint."""

import dataclasses
import pathlib
import sys
from collections.abc import Iterator, Sequence

from rlhf_jax.data.encoded import EncodedPrompt
from rlhf_jax.data.prepare import DataConfig
from rlhf_jax.io import progress
from rlhf_jax.io.chat import ChatClient, ChatConfig, Question
from rlhf_jax.programs.generate import GenerateConfig
from rlhf_jax.programs.sampler import Sampler, open_sampler
from rlhf_jax.programs.scorer import ScoringConfig
from rlhf_jax.programs.seam_prompts import SeamPrompt, Worse, as_text
from rlhf_jax.sampling.generate import SamplingConfig
from rlhf_jax.sharding import make_mesh

_PART = 64
"""Prompts that a local policy answers between two writes to disk, about."""

INSTRUCTION = (
    "Answer the request below as a careless writer would. The answer must be fluent, "
    "sure of itself and about the request, but worse than a good one: give it factual "
    "errors, misunderstandings, gaps or parts that do not belong. Write the answer "
    "alone.\n\nRequest: {prompt}"
)


@dataclasses.dataclass(frozen=True)
class WriterConfig:
    """Who writes worse completions."""

    model: str | None = None
    """A local policy: run directory, HF directory, hub id or .gguf."""
    chat: ChatConfig = ChatConfig()
    """Or an endpoint."""
    count: int = 30
    """Completions of each prompt."""
    temperature: float = 1.0
    """Of the sampling."""
    max_new_tokens: int = 128
    """Longest completion of a local policy; of an endpoint it is chat.max_tokens."""
    batch_size: int = 16
    """Prompts that a local policy continues together; rounded up to a multiple of the
    devices."""
    max_failed: float = 0.0
    """Share of an endpoint's questions that may fail; the others are kept either way,
    so that the same command asks only these again."""
    instruction: str = INSTRUCTION
    """What the writer is asked; {prompt} is the prompt."""

    def __post_init__(self) -> None:
        if "{prompt}" not in self.instruction:
            raise ValueError("writer.instruction: expected {prompt} in it")
        if self.count < 1 or not 0 <= self.max_failed < 1:
            raise ValueError(
                f"writer.count {self.count}, writer.max_failed {self.max_failed}: "
                "expected at least 1, and a share in [0, 1)"
            )
        if self.batch_size < 1:
            raise ValueError(
                f"writer.batch_size: expected at least 1, got {self.batch_size}"
            )
        if self.model is not None and self.chat.base_url is not None:
            raise ValueError("writer: expected model or chat.base_url, not both")

    @property
    def part(self) -> int:
        """Prompts of a part: whole batches."""
        return max(_PART // self.batch_size, 1) * self.batch_size


def by_policy(
    prompts: Sequence[SeamPrompt],
    config: WriterConfig,
    scoring: ScoringConfig,
    seed: int,
    *,
    start: int,
) -> Iterator[Worse]:
    """Completions that a local policy was asked to make worse, part by part.

    A prompt that the policy cannot take has none. Texts that were cut off are left out:
    half a completion is not what the models would judge. Both are counted and shown.

    Args:
        prompts: all of them.
        config: model and sampling.
        scoring: its mesh and compute are the writer's too.
        seed: of the sampling.
        start: the first prompt of the first part, a multiple of `config.part`.

    Raises:
        ValueError: no such model.
    """
    mesh = make_mesh(scoring.mesh)
    sampler = open_sampler(_sampling(config, scoring, seed), mesh)
    name = pathlib.PurePath(str(config.model)).name
    cut = refused = 0
    with progress.counting_bar("generate", len(prompts)) as advance:
        advance(start)
        for first in range(start, len(prompts), config.part):
            part = prompts[first : first + config.part]
            made: list[dict[str, None]] = [{} for _ in part]
            asked = _encoded(part, config, sampler)
            refused += len(part) - len(asked)
            for place in range(0, len(asked), sampler.together):
                some = asked[place : place + sampler.together]
                texts, rollout = sampler.sample(some, first + place)
                found = zip(texts.rows, texts.completions, rollout.stopped, strict=True)
                for row, text, stopped in found:
                    cut += not stopped
                    if stopped and text.strip():
                        made[row["place"]].setdefault(text.strip())
            yield _not_gold(part, made, name)
            advance(len(part))
    if cut:
        progress.say(
            f"generate: {cut:,} completions were cut off at writer.max_new_tokens "
            f"{config.max_new_tokens} and are left out"
        )
    if refused:
        progress.say(
            f"generate: {refused:,} prompts are longer than the {sampler.prompt_limit} "
            f"tokens that {config.model} takes, or refused by its template: no "
            "completion"
        )


def _sampling(
    config: WriterConfig, scoring: ScoringConfig, seed: int
) -> GenerateConfig:
    """What `sampler.open_sampler` reads."""
    return GenerateConfig(
        model=str(config.model),
        data=["prompts"],  # not read: they are at hand
        batch_size=config.batch_size,
        seed=seed,
        sampling=SamplingConfig(
            num_samples=config.count,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
        ),
        rows=DataConfig(max_length=scoring.max_length or sys.maxsize),  # the model's
        compute=dataclasses.replace(scoring.compute, scan_layers=False),
        mesh=scoring.mesh,
    )


def _encoded(
    prompts: Sequence[SeamPrompt], config: WriterConfig, sampler: Sampler
) -> list[EncodedPrompt]:
    """The requests that the policy can take, each with its place among `prompts`."""
    found = []
    for place, prompt in enumerate(prompts):
        text = _instruct(prompt, config)
        try:
            tokens = sampler.encoder.prompt(text)
        except ValueError:
            continue
        if len(tokens) <= sampler.prompt_limit:
            found.append(EncodedPrompt(tokens, text, {"place": place}, prompt.where))
    return found


def by_endpoint(prompts: Sequence[SeamPrompt], config: WriterConfig) -> Worse:
    """Completions that an endpoint was asked to make worse.

    Raises:
        ValueError: it cannot be asked, or too many questions failed.
    """
    questions = [
        Question(
            [{"role": "user", "content": _instruct(prompt, config)}],
            config.temperature,
            sample,
        )
        for prompt in prompts
        for sample in range(config.count)
    ]
    with ChatClient(config.chat) as chat:
        found = chat.estimate(questions)
        progress.say(f"generate: {config.chat.model}: {found.describe()}")
        with progress.counting_bar("generate", len(questions)) as advance:
            replies = chat.ask(questions, advance)
    failed = [reply.error for reply in replies if reply.error is not None]
    if failed:
        said = f"generate: {len(failed):,} of {len(replies):,} questions failed"
        if len(failed) > config.max_failed * len(replies):
            raise ValueError(
                f"{said}, the first: {failed[0]}; the other replies are kept: run "
                "again to ask these once more, or accept them with writer.max_failed"
            )
        progress.say(f"{said}, the first: {failed[0]}")
    made: list[dict[str, None]] = [{} for _ in prompts]
    for number, reply in enumerate(replies):
        if reply.text.strip():
            made[number // config.count].setdefault(reply.text.strip())
    return _not_gold(prompts, made, str(config.chat.model))


def _instruct(prompt: SeamPrompt, config: WriterConfig) -> str:
    return config.instruction.replace("{prompt}", as_text(prompt.prompt))


def _not_gold(
    prompts: Sequence[SeamPrompt], made: Sequence[dict[str, None]], writer: str
) -> Worse:
    return [
        [{"text": t, "source": writer} for t in texts if t != prompt.gold.strip()]
        for prompt, texts in zip(prompts, made, strict=True)
    ]
