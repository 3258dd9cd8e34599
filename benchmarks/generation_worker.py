"""The transformers side of generation.py: `generate`, one call at a time, on request.

A request holds everything; the answer holds the seconds from lists of token ids to
generated ids, and how many of these are completions (the stop token included, padding
after it not). Prompts are padded on the left, as `generate` needs them, to the longest
of their call.
"""

from worker import answer, job, measured_flops, wait  # isort: skip

import time
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation import ContinuousBatchingConfig


def padded(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    """Ids and mask, padded on the left."""
    longest = max(map(len, prompts))
    tokens = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return {"input_ids": tokens, "attention_mask": mask}


def settings(request: dict[str, Any]) -> GenerationConfig:
    """What all calls of a request share."""
    how: dict[str, Any] = {"do_sample": False}
    if not request["greedy"]:
        how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        how["num_return_sequences"] = request["samples"]
    return GenerationConfig(
        **how,
        max_new_tokens=request["new_tokens"],
        # None: nothing stops, which is cheaper than suppressing a stop token.
        eos_token_id=request["stops"] or None,
        pad_token_id=0,
        use_cache=True,
        cache_implementation=request["cache"],
        disable_compile=True,
    )


def useful(completions: torch.Tensor, stops: list[int]) -> list[list[int]]:
    """Each completion up to its stop token."""
    rows = []
    for row in completions.tolist():
        ends = [at for at, token in enumerate(row) if token in stops]
        rows.append(row[: ends[0] + 1] if ends else row)
    return rows


def turn(model: Any, request: dict[str, Any]) -> dict[str, Any]:
    """One request, timed."""
    torch.manual_seed(request["seed"])
    config, prompts = settings(request), request["prompts"]
    if request["continuous"]:
        start = time.perf_counter()
        outputs = model.generate_batch(
            prompts,
            generation_config=config,
            # Of the machine's memory; the default takes nearly all of it.
            continuous_batching_config=ContinuousBatchingConfig(max_memory_percent=0.1),
            progress_bar=False,
        )
        seconds = time.perf_counter() - start
        lengths = [len(output.generated_tokens) for output in outputs.values()]
        return {"seconds": seconds, "tokens": sum(lengths)}
    rows = request["rows"]
    size = rows // request["samples"] if rows else len(prompts)
    found: list[torch.Tensor] = []
    start = time.perf_counter()
    for at in range(0, len(prompts), size):
        inputs = padded(prompts[at : at + size])
        with torch.inference_mode():
            ids = model.generate(**inputs, generation_config=config)
        found.append(ids[:, inputs["input_ids"].shape[1] :])
    seconds = time.perf_counter() - start
    stops = request["stops"]
    return {
        "seconds": seconds,
        "tokens": sum(len(row) for part in found for row in useful(part, stops)),
    }


def greedy(model: Any, request: dict[str, Any]) -> dict[str, Any]:
    """The most probable completions, and how far behind each next best token was."""
    inputs, config = padded(request["prompts"]), settings(request)
    config.return_dict_in_generate = config.output_scores = True
    with torch.inference_mode():
        result = model.generate(
            **inputs,
            generation_config=config,
        )
    best = torch.stack([step.topk(2).values for step in result.scores])
    ids = result.sequences[:, inputs["input_ids"].shape[1] :]
    return {
        "completions": useful(ids, request["stops"]),
        "gaps": (best[..., 0] - best[..., 1]).T.tolist(),
    }


def main() -> None:
    model = AutoModelForCausalLM.from_pretrained(job()["model"], dtype=torch.float32)
    model.eval()
    # Of its own it would stop at the ids that LlamaConfig names by default.
    model.generation_config = GenerationConfig()
    answer(
        ceiling=measured_flops(),
        threads=torch.get_num_threads(),
        version=transformers.__version__,
    )
    while request := wait():
        answer(**(greedy if request["greedy"] else turn)(model, request))
    answer(ceiling=measured_flops())


main()
