"""The TRL side of rloo_step.py: RLOOTrainer, one step at a time, on request.

An ordinary `RLOOTrainer.train()` with its own generation, scoring, clipping and fused
AdamW. A callback makes every step wait for a line on stdin; the clock runs from there
to the end of the update, so data loading and logging between steps do not count. The
subclass only takes the time of TRL's own methods and keeps the numbers of the first
step. Gradient checkpointing and bfloat16, which TRL turns on by default, are off: the
first is slower, the second another precision.
"""

from worker import answer, job, measured_flops, wait  # isort: skip

import time
from typing import Any

import torch
import trl
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl import RLOOConfig, RLOOTrainer


class Timed(RLOOTrainer):
    """Seconds of the parts of a step; `first` is what the first step computed."""

    def __init__(self, **options: Any) -> None:
        self.parts: dict[str, float] = {}
        self.first: dict[str, Any] = {}
        self.sums: list[list[float]] = []
        super().__init__(**options)

    def _take(self, part: str, method: Any, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = method(*args, **kwargs)
        spent = time.perf_counter() - start
        self.parts[part] = self.parts.get(part, 0.0) + spent
        return result

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        return self._take("generate", super()._generate, *args, **kwargs)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        method = super()._calculate_rewards
        rewards = self._take("reward", method, *args, **kwargs)
        self.first.setdefault("rewards", rewards[:, 0].tolist())
        return rewards

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        method = super()._get_per_token_logps_and_entropies
        if torch.is_grad_enabled():  # the update's own forward pass
            return method(*args, **kwargs)
        result = self._take("logprobs", method, *args, **kwargs)
        if len(self.sums) < 2:  # of the policy, then of the reference
            self.sums.append(result[0].sum(dim=1).tolist())
        return result

    def _prepare_inputs(self, *args: Any, **kwargs: Any) -> Any:
        return self._take("before_update", super()._prepare_inputs, *args, **kwargs)

    def _generate_and_score_completions(self, *args: Any, **kwargs: Any) -> Any:
        output = super()._generate_and_score_completions(*args, **kwargs)
        if "advantages" not in self.first:
            self.first |= {
                "prompts": [
                    ids[mask.bool()].tolist()
                    for ids, mask in zip(output["prompt_ids"], output["prompt_mask"])
                ],
                "completions": output["completion_ids"].tolist(),
                "logprobs": self.sums[0],
                "ref_logprobs": self.sums[1],
                "advantages": output["advantages"].tolist(),
            }
        return output


class TakeTurns(TrainerCallback):
    """Waits for a line before each step and answers after it."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.start = 0.0

    def on_step_begin(self, args, state, control, **_):
        wait()
        self.trainer.parts.clear()
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        answer(seconds=time.perf_counter() - self.start, parts=self.trainer.parts)


def main() -> None:
    todo = job()
    tokenizer = AutoTokenizer.from_pretrained(todo["policy"], padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(todo["policy"], dtype=torch.float32)
    policy.generation_config.eos_token_id = tokenizer.eos_token_id
    # Where RLOOTrainer loads the reference from.
    policy.config._name_or_path = todo["reference"]
    reward = AutoModelForSequenceClassification.from_pretrained(
        todo["reward"], dtype=torch.float32
    )
    config = RLOOConfig(
        output_dir=todo["out"],
        per_device_train_batch_size=todo["prompts_a_step"] * todo["samples"],
        num_generations=todo["samples"],
        max_completion_length=todo["new_tokens"],
        generation_kwargs={"min_new_tokens": todo["new_tokens"]},
        max_steps=todo["steps"],
        beta=todo["kl_coef"],
        epsilon=todo["clip_eps"],
        learning_rate=todo["learning_rate"],
        lr_scheduler_type="constant",
        shuffle_dataset=False,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        logging_first_step=True,
        logging_steps=10**9,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    turns = TakeTurns()
    trainer = turns.trainer = Timed(
        model=policy,
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": text} for text in todo["prompts"]]),
        processing_class=tokenizer,
        reward_processing_classes=tokenizer,
        callbacks=[turns],
    )
    answer(
        ceiling=measured_flops(),
        threads=torch.get_num_threads(),
        version=trl.__version__,
    )
    trainer.train()
    logged = trainer.state.log_history[0]
    first = {name: logged[name] for name in ("loss", "grad_norm", "kl")}
    answer(ceiling=measured_flops(), first=trainer.first | first)


main()
