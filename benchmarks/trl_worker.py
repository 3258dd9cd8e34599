"""The TRL side of reward_step.py: RewardTrainer, one step at a time, on request.

Runs in benchmarks/.envs/trl (see envs.sh), imports nothing of rlhf_jax. It is an
ordinary `RewardTrainer.train()` with its own collation, clipping and fused AdamW; a
callback makes every step wait for a line on stdin and answers with the seconds it took,
so that the steps of both sides can take turns. Gradient checkpointing and bfloat16,
which TRL turns on by default, are off: the first is slower, the second another
precision.
"""

from worker import answer, job, measured_flops, wait  # isort: skip

import time

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl import RewardConfig, RewardTrainer


class TakeTurns(TrainerCallback):
    """Waits for a line before each step; a step runs from its batch to its update."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.start = 0.0

    def wait(self) -> None:
        wait()
        self.start = time.perf_counter()

    def on_train_begin(self, args, state, control, **_):
        self.wait()

    def on_step_end(self, args, state, control, **_):
        answer(seconds=time.perf_counter() - self.start)
        if state.global_step < self.steps:
            self.wait()


def main() -> None:
    todo = job()
    model = AutoModelForSequenceClassification.from_pretrained(
        todo["model"], dtype=torch.float32
    )
    vocabulary = {f"<{i}>": i for i in range(model.config.vocab_size)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="<0>")),
        pad_token="<0>",
        eos_token="<1>",
    )
    rows = [
        {
            "chosen_ids": pair["prompt"] + pair["chosen"],
            "rejected_ids": pair["prompt"] + pair["rejected"],
        }
        for pair in todo["pairs"]
    ]
    config = RewardConfig(
        output_dir=todo["out"],
        per_device_train_batch_size=todo["batch_size"],
        max_steps=todo["steps"],
        train_sampling_strategy="sequential",
        learning_rate=todo["learning_rate"],
        lr_scheduler_type="constant",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = RewardTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[TakeTurns(todo["steps"])],
    )
    first = trainer.data_collator(rows[: todo["batch_size"]])

    def loss() -> float:
        with torch.no_grad():
            return trainer.compute_loss(trainer.model, dict(first)).item()

    answer(loss=loss(), ceiling=measured_flops(), threads=torch.get_num_threads())
    trainer.train()
    answer(loss=loss(), ceiling=measured_flops())


main()
