"""What drivers of rounds share: where a round lives, the policy it begins with, its RL
run, and parts that are not run twice."""

import pathlib
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

from rlhf_jax import config as configs
from rlhf_jax.io import progress
from rlhf_jax.io.run_dir import is_finished
from rlhf_jax.programs import ppo, rloo
from rlhf_jax.programs.runs import MAY_CHANGE

RlProgram: TypeAlias = Literal["rloo", "ppo"]
RL: dict[str, Any] = {
    "rloo": (rloo.RlooConfig, rloo.run),
    "ppo": (ppo.PpoConfig, ppo.run),
}
"""name -> (config, run)."""


def folder(run_dir: str, number: int) -> pathlib.Path:
    """Of a round, from 1."""
    return pathlib.Path(run_dir) / f"round-{number}"


def policy_before(run_dir: str, policy: str, rl: str, number: int) -> str:
    """The policy that a round begins with."""
    return policy if number == 1 else str(folder(run_dir, number - 1) / rl)


def rl_part(
    config: Any, number: int, *, data: list[str], reward: str, seed: int
) -> Any:
    """The RL run of a round: its YAML, and what every driver sets.

    Args:
        config: of the driver; run_dir, policy, rl, rl_config, eval_prompts and gold are
            read.
        number: of the round, from 1.
        data: prompts.
        reward: what is trained on.
        seed: of this round.
    """
    flags = {
        "run_dir": str(folder(config.run_dir, number) / config.rl),
        "model": policy_before(config.run_dir, config.policy, config.rl, number),
        "reference": config.policy,
        "data": data,
        "reward": [reward],
        "eval_data": config.eval_prompts,
        "gold": config.gold,
        "seed": seed,
    }
    return configs.load(RL[config.rl][0], config.rl_config, flags)


def run_part(title: str, program: Callable[[Any], Any], config: Any) -> None:
    """Runs a part of a round, unless it is done."""
    if not is_finished(config.run_dir, config, may_change=MAY_CHANGE):
        progress.say(title)
        program(config)


def check_file(name: str, path: str | None) -> None:
    """The YAML of a part, if one is named.

    Raises:
        ValueError: there is no such file.
    """
    if path is not None and not pathlib.Path(path).is_file():
        raise ValueError(f"{name} {path!r}: no such file")
