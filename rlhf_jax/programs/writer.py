"""Worse completions written on request: by a local policy or an endpoint."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence

from rlhf_jax.io import progress
from rlhf_jax.io.chat import ChatClient, ChatConfig, Question
from rlhf_jax.programs import generate, scored_rows, training
from rlhf_jax.programs.seam_prompts import SeamPrompt, Worse, as_text
from rlhf_jax.sampling.generate import SamplingConfig

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
    """Prompts that a local policy continues together."""
    instruction: str = INSTRUCTION
    """What the writer is asked; {prompt} is the prompt."""

    def __post_init__(self) -> None:
        if "{prompt}" not in self.instruction:
            raise ValueError("writer.instruction: expected {prompt} in it")
        if self.count < 1:
            raise ValueError(f"writer.count: expected at least 1, got {self.count}")
        if self.model is not None and self.chat.base_url is not None:
            raise ValueError("writer: expected model or chat.base_url, not both")


def by_generation(
    prompts: Sequence[SeamPrompt], config: WriterConfig, root: pathlib.Path, seed: int
) -> Worse:
    """Completions that a model was asked to make worse.

    A prompt that a local writer cannot take, or whose replies all failed, has none;
    failed replies are counted and shown.

    Raises:
        ValueError: no writer, or one that cannot be asked at all.
    """
    if config.chat.base_url is not None:
        return _written_by_endpoint(prompts, config)
    asked, raw = root / "generate-prompts.jsonl", root / "generate-raw.jsonl"
    scored_rows.write_whole(
        asked,
        (
            {"prompt": _instruct(prompt, config), "index": prompt.index}
            for prompt in prompts
        ),
    )
    generate.run(
        generate.GenerateConfig(
            model=str(config.model),
            data=[str(asked)],
            out=str(raw),
            overwrite=True,
            batch_size=config.batch_size,
            seed=seed,
            sampling=SamplingConfig(
                num_samples=config.count,
                max_new_tokens=config.max_new_tokens,
                temperature=config.temperature,
            ),
        )
    )
    made: list[dict[str, None]] = [{} for _ in prompts]
    for line in raw.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if text := row["completion"].strip():
            made[row["index"]].setdefault(text)
    return _not_gold(prompts, made, pathlib.PurePath(str(config.model)).name)


def _written_by_endpoint(prompts: Sequence[SeamPrompt], config: WriterConfig) -> Worse:
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
        training.say(f"generate: {config.chat.model}: {found.describe()}")
        with progress.counting_bar("generate", len(questions)) as advance:
            replies = chat.ask(questions, advance)
    failed = [reply.error for reply in replies if reply.error is not None]
    if len(failed) == len(replies):
        raise ValueError(f"generate: every question failed; the first: {failed[0]}")
    if failed:
        training.say(f"generate: {len(failed):,} questions failed; {failed[0]}")
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
