"""`rlhf-jax quickstart`: the whole story on the embedded testbed, in four minutes.

SFT, a reward model on preferences with known label noise, RLOO against that reward
model with the exact gold reward logged beside it; then the reward model on the four
disjoint scenarios of the BSR paper (arXiv:2505.07271, section 3), and exports for
transformers. Nothing is downloaded. Every part is a run of the program of that name,
in a directory of its own.
"""

import dataclasses
import json
import pathlib
from typing import Any

from rich.console import Console
from rich.table import Table

from rlhf_jax.algorithms.optimizer import OptimizerConfig
from rlhf_jax.data.prepare import DataConfig
from rlhf_jax.models.config import ComputeConfig
from rlhf_jax.programs import evaluate, export, reward, rloo, sft
from rlhf_jax.programs.reinforcement import RLLoopConfig
from rlhf_jax.programs.supervised import LoopConfig
from rlhf_jax.sampling.generate import SamplingConfig

SCENARIOS = {
    "val_id": "same prompts and styles, new responses",
    "val_prompt_ood": "new prompts",
    "val_response_ood": "new styles of response",
    "val_both_ood": "new prompts and new styles",
}
GOLD = "rlhf_jax.testbed:gold_rewards"
FEW_SHAPES = DataConfig(num_shapes=1)
UNROLLED = ComputeConfig(scan_layers=False)
"""Of models so small that compiling them takes longer than training them."""


@dataclasses.dataclass(frozen=True)
class QuickstartConfig:
    """SFT, reward model and RLOO on the embedded testbed."""

    run_dir: str = "runs/quickstart"
    """Directory of the runs; finished ones are only shown again."""
    sft_steps: int = 500
    """Optimizer steps of 64 demonstrations."""
    reward_steps: int = 300
    """Optimizer steps of 64 pairs."""
    rloo_steps: int = 60
    """Steps of 32 prompts with four completions each."""
    pairs: int = 12_000
    """Training pairs."""
    flip_rate: float = 0.1
    """Share of training labels that are flipped."""
    eval_rows: int = 400
    """Pairs, and quads, of each scenario."""
    seed: int = 0
    """Seed of the data, the weights and the order."""


def run(config: QuickstartConfig) -> None:
    """Trains, evaluates, exports and prints what came out and where it lies."""
    root = pathlib.Path(config.run_dir)
    sft.run(sft_config(config))
    reward.run(reward_config(config))
    result = evaluate.run(evaluate_config(config))
    rloo.run(rloo_config(config))
    for name in ("reward", "rloo"):
        if not (root / f"{name}-export").exists():
            export.run(
                export.ExportConfig(
                    model=str(root / name), out=str(root / f"{name}-export")
                )
            )
    console = Console()
    console.print(scenario_table(result))
    console.print(policy_table(root / "rloo"))
    for what, where in (
        ("gold and proxy", root / "rloo" / "plots" / "over_optimisation.png"),
        ("reports", root / "{sft,reward,rloo}" / "report.html"),
        ("exported", root / "{reward,rloo}-export"),
        ("next", f"rlhf-jax generate --model {root / 'rloo'} --data testbed:rl_val"),
    ):
        console.print(f"{what:15} {where}", highlight=False)


def sft_config(config: QuickstartConfig) -> sft.SftConfig:
    """The `rlhf-jax sft` run."""
    return sft.SftConfig(
        run_dir=f"{config.run_dir}/sft",
        model="testbed",
        data=[f"testbed:sft?size=10000&seed={config.seed}"],
        eval_data=[f"val=testbed:sft_val?size=200&seed={config.seed}"],
        batch_size=64,
        steps=config.sft_steps,
        seed=config.seed,
        rows=FEW_SHAPES,
        optimizer=OptimizerConfig(learning_rate=4e-3, schedule="cosine"),
        loop=LoopConfig(eval_every=max(config.sft_steps // 3, 1), keep=1),
        compute=UNROLLED,
    )


def reward_config(config: QuickstartConfig) -> reward.RewardConfig:
    """The `rlhf-jax reward` run; it starts from the SFT policy."""
    train = f"testbed:train?size={config.pairs}&seed={config.seed}"
    held_out = f"testbed:val_id?size={config.eval_rows}&seed={config.seed}"
    return reward.RewardConfig(
        run_dir=f"{config.run_dir}/reward",
        model=f"{config.run_dir}/sft",
        data=[f"{train}&flip_rate={config.flip_rate}"],
        eval_data=[f"id={held_out}"],
        batch_size=64,
        steps=config.reward_steps,
        seed=config.seed,
        rows=FEW_SHAPES,
        optimizer=OptimizerConfig(
            learning_rate=2e-3, schedule="cosine", weight_decay=0.01, final_scale=0.05
        ),
        loop=LoopConfig(eval_every=max(config.reward_steps // 3, 1), keep=1),
        compute=UNROLLED,
    )


def evaluate_config(config: QuickstartConfig) -> evaluate.EvaluateConfig:
    """The `rlhf-jax evaluate` call on the four scenarios, as pairs and as quads."""
    options = f"size={config.eval_rows}&seed={config.seed}"
    return evaluate.EvaluateConfig(
        model=f"{config.run_dir}/reward",
        out=f"{config.run_dir}/reward",
        eval_data=[
            f"{prefix}{name}=testbed:{prefix}{name}?{options}"
            for prefix in ("", "quads_")
            for name in SCENARIOS
        ],
        seed=config.seed,
    )


def rloo_config(config: QuickstartConfig) -> rloo.RlooConfig:
    """The `rlhf-jax rloo` run: the reward model rewards, the gold reward looks on."""
    return rloo.RlooConfig(
        run_dir=f"{config.run_dir}/rloo",
        model=f"{config.run_dir}/sft",
        data=[f"testbed:rl?size=4000&seed={config.seed}"],
        reward=[f"{config.run_dir}/reward"],
        gold=GOLD,
        eval_data=[f"val=testbed:rl_val?size=512&seed={config.seed}"],
        batch_size=32,
        steps=config.rloo_steps,
        seed=config.seed,
        loss=rloo.RlooLossConfig(kl_coef=0.3),
        sampling=SamplingConfig(num_samples=4, max_new_tokens=48),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup=0.05),
        loop=RLLoopConfig(keep=1, eval_every=max(config.rloo_steps // 3, 1)),
        compute=UNROLLED,
    )


def scenario_table(result: dict[str, Any]) -> Table:
    """Accuracy on pairs and Kendall's tau on quads for each scenario."""
    sets = {entry["name"]: entry["metrics"] for entry in result["sets"]}
    table = Table(title="reward model on the testbed, against the gold reward")
    table.add_column("scenario")
    table.add_column("")
    for name in ("accuracy", "95% interval", "Kendall tau"):
        table.add_column(name, justify="right")
    for name, meaning in SCENARIOS.items():
        pairs, quads = sets[name], sets[f"quads_{name}"]
        table.add_row(
            name,
            meaning,
            f"{pairs['accuracy']:.3f}",
            f"{pairs['accuracy_low']:.3f} .. {pairs['accuracy_high']:.3f}",
            f"{quads['kendall_tau']:.3f}",
        )
    return table


def policy_table(run_dir: pathlib.Path) -> Table:
    """Rewards on held-out prompts, before and after RLOO."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    judged = [row for row in rows if "eval/val/gold" in row]
    table = Table(title="policy on held-out prompts, before and after RLOO")
    for name in ("", "gold reward", "proxy reward", "tokens", "KL in training"):
        table.add_column(name, justify="right" if name else "left")
    for name, row in (("SFT", judged[0]), ("RLOO", judged[-1])):
        table.add_row(
            name,
            f"{row['eval/val/gold']:.3f}",
            f"{row['eval/val/proxy']:.3f}",
            f"{row['eval/val/length']:.1f}",
            f"{row.get('policy/kl', 0.0):.2f}",
        )
    return table
