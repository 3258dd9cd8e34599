"""Worse completions written on request: by a local policy or an endpoint."""

import dataclasses
import pathlib
from collections.abc import Sequence

from rlhf_jax.io import progress
from rlhf_jax.io.chat import ChatClient, ChatConfig, Question
from rlhf_jax.programs import generate, scored_rows
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
        if self.model is not None and self.chat.base_url is not None:
            raise ValueError("writer: expected model or chat.base_url, not both")


def by_generation(
    prompts: Sequence[SeamPrompt], config: WriterConfig, root: pathlib.Path, seed: int
) -> Worse:
    """Completions that a model was asked to make worse.

    A prompt that a local writer cannot take has none. Texts that were cut off are left
    out, counted and shown: half a completion is not what the models would judge.

    Raises:
        ValueError: an endpoint that cannot be asked, or of which too much failed.
    """
    if config.chat.base_url is not None:
        return _written_by_endpoint(prompts, config)
    asked, raw = root / "generate-prompts.jsonl", root / "generate-raw.jsonl"
    scored_rows.write_whole(
        asked,
        (
            {"prompt": _instruct(prompt, config), "index": n}
            for n, prompt in enumerate(prompts)
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
    cut = 0
    for row in scored_rows.read_jsonl(raw):
        if not row["stopped"]:
            cut += 1
        elif text := row["completion"].strip():
            made[row["index"]].setdefault(text)
    if cut:
        progress.say(
            f"generate: {cut:,} completions were cut off at writer.max_new_tokens "
            f"{config.max_new_tokens} and are left out"
        )
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
