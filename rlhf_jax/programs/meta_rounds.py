"""`rlhf-jax meta-rounds`: MetaRM's rounds. Each round samples from the policy of now,
meta-trains a reward model on these completions, and trains the policy against it.

    round r    generate     k completions of each prompt by the policy of round r - 1
               meta-reward  from --reward_start, on the pairs and these completions
               rloo or ppo  from the policy of round r - 1

Every part is a run of the program of that name in `round-R/`, with the settings of its
own YAML; what is done is not repeated, so a stopped driver goes on where it was.

Source: Wang et al. 2024, arXiv:2401.06080, section 4.2; Dou et al. 2024,
arXiv:2405.00438.
"""

import dataclasses
import pathlib
from typing import Any

from rlhf_jax import config as configs
from rlhf_jax.io import progress
from rlhf_jax.io.run_dir import open_run
from rlhf_jax.programs import generate, meta_reward, rounds
from rlhf_jax.programs.rounds import RlProgram
from rlhf_jax.sampling.generate import SamplingConfig


@dataclasses.dataclass(frozen=True)
class MetaRoundsConfig:
    """MetaRM and RL in turns."""

    run_dir: str
    """Directory of all rounds."""
    policy: str
    """Policy to begin with, and the reference of every round: run, HF directory ..."""
    reward_start: str
    """What each round's reward model is trained from: the SFT policy, or a reward
    model."""
    data: list[str]
    """Training pairs, SPEC or WEIGHT*SPEC."""
    prompts: str
    """Prompts of the RL runs, and of the meta sets, SPEC."""
    meta_prompts: str | None = None
    """Prompts of the meta sets, if other ones."""
    rounds: int = 4
    """Rounds; the papers find the gain gone after the third or fourth."""
    rl: RlProgram = "rloo"
    """Program that trains the policy."""
    rl_config: str | None = None
    """YAML of that program; model, data, reward and run_dir are set here."""
    meta_config: str | None = None
    """YAML of the meta-reward program, likewise."""
    eval_data: list[str] = dataclasses.field(default_factory=list)
    """Evaluation pairs of the reward models as NAME=SPEC."""
    eval_prompts: list[str] = dataclasses.field(default_factory=list)
    """Evaluation prompts of the policies as NAME=SPEC."""
    gold: str | None = None
    """A reward that is logged beside and never trained on."""
    batch_size: int = 32
    """Prompts continued together for the meta sets."""
    sampling: SamplingConfig = SamplingConfig(
        num_samples=5, max_new_tokens=128, temperature=0.8, top_p=0.9
    )
    """How the meta sets are drawn; num_samples is k, 5 in the paper."""
    seed: int = 0
    """Seed of all rounds; round r adds r."""

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds: expected at least 1, got {self.rounds}")
        if self.sampling.num_samples < 2:
            raise ValueError(
                f"sampling.num_samples: expected at least 2, got "
                f"{self.sampling.num_samples}: the meta objective compares completions "
                "of one prompt"
            )
        rounds.check_file("rl_config", self.rl_config)
        rounds.check_file("meta_config", self.meta_config)
        self.meta_of(1)  # what the parts refuse is refused now
        self.rl_of(1)

    def folder(self, number: int) -> pathlib.Path:
        """Of a round, from 1."""
        return rounds.folder(self.run_dir, number)

    def policy_before(self, number: int) -> str:
        """The policy that a round begins with."""
        return rounds.policy_before(self.run_dir, self.policy, self.rl, number)

    def meta_of(self, number: int) -> meta_reward.MetaRewardConfig:
        """The meta-reward run of a round."""
        flags = {
            "run_dir": str(self.folder(number) / "reward"),
            "model": self.reward_start,
            "data": self.data,
            "shifted": [str(self.folder(number) / "shifted.jsonl")],
            "eval_data": self.eval_data,
            "seed": self.seed + number,
        }
        return configs.load(meta_reward.MetaRewardConfig, self.meta_config, flags)

    def rl_of(self, number: int) -> Any:
        """The RL run of a round."""
        return rounds.rl_part(
            self,
            number,
            data=[self.prompts],
            reward=str(self.folder(number) / "reward"),
            seed=self.seed + number,
        )


def run(config: MetaRoundsConfig) -> pathlib.Path:
    """Runs the rounds that are not done; returns run_dir."""
    opened = open_run(config.run_dir, config, holds_runs=True, may_change=("rounds",))
    with opened.lock:
        for number in range(1, config.rounds + 1):
            folder = config.folder(number)
            folder.mkdir(exist_ok=True)
            shifted = folder / "shifted.jsonl"
            if not shifted.exists():
                progress.say(f"round {number}: sampling")
                _sample(config, number, shifted)
            title = f"round {number}: {{}}"
            meta, rl = config.meta_of(number), config.rl_of(number)
            rounds.run_part(title.format("meta-reward"), meta_reward.run, meta)
            rounds.run_part(title.format(config.rl), rounds.RL[config.rl][1], rl)
    return opened.path


def _sample(config: MetaRoundsConfig, number: int, out: pathlib.Path) -> None:
    """The meta set of a round, written under another name first."""
    partial = out.with_name("sampling.jsonl")
    generate.run(
        generate.GenerateConfig(
            model=config.policy_before(number),
            data=[config.meta_prompts or config.prompts],
            out=str(partial),
            overwrite=True,
            grouped=True,
            gold=config.gold,
            batch_size=config.batch_size,
            seed=config.seed + number,
            sampling=config.sampling,
        )
    )
    partial.rename(out)
