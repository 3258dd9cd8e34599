"""`rlhf-jax seam-rounds`: RL whose prompts are selected anew as the policy moves.

    round r    seam         of the policy of round r - 1 and the reward model
               seam-select  the prompts without the lowest
               rloo or ppo  from the policy of round r - 1, on these prompts

Every part is a run of the program of that name in `round-R/`, with the settings of its
own YAML; what is done is not repeated. The reference of every round is the policy to
begin with; optimizer and learning-rate schedule begin anew in each. A round's steps are
those of the RL program: set them to how long a selection should serve.
"""

import dataclasses
import pathlib
from typing import Any

from rlhf_jax import config as configs
from rlhf_jax.io.run_dir import open_run
from rlhf_jax.programs import rounds, seam, seam_select
from rlhf_jax.programs.rounds import RlProgram


@dataclasses.dataclass(frozen=True)
class SeamRoundsConfig:
    """SEAM selection and RL in turns."""

    run_dir: str
    """Directory of all rounds."""
    policy: str
    """Policy to begin with, and the reference of every round."""
    reward: str
    """Reward model, of both SEAM and RL."""
    data: list[str]
    """Prompts with gold completions, SPEC; repeat for several."""
    rounds: int = 4
    """Rounds."""
    drop: float = 0.2
    """Share of the prompts that each round leaves out."""
    random: bool = False
    """Leave out random prompts instead: the control. SEAM is measured all the same."""
    rl: RlProgram = "rloo"
    """Program that trains the policy."""
    rl_config: str | None = None
    """YAML of that program; model, reference, data, reward and run_dir are set here."""
    seam_config: str | None = None
    """YAML of the seam program, likewise; its first estimator selects."""
    eval_prompts: list[str] = dataclasses.field(default_factory=list)
    """Evaluation prompts of the policies as NAME=SPEC."""
    gold: str | None = None
    """A reward that is logged beside and never trained on."""
    seed: int = 0
    """Seed of all rounds: round r has 1000 times it, and r."""

    def __post_init__(self) -> None:
        if self.rounds < 1 or not 0 < self.drop < 1:
            raise ValueError(
                f"rounds {self.rounds}, drop {self.drop}: expected at least 1, and a "
                "share between 0 and 1"
            )
        rounds.check_file("rl_config", self.rl_config)
        rounds.check_file("seam_config", self.seam_config)
        self.seam_of(1)  # what the parts refuse is refused now
        self.rl_of(1)

    def folder(self, number: int) -> pathlib.Path:
        """Of a round, from 1."""
        return rounds.folder(self.run_dir, number)

    def policy_before(self, number: int) -> str:
        """The policy that a round begins with."""
        return rounds.policy_before(self.run_dir, self.policy, self.rl, number)

    def seed_of(self, number: int) -> int:
        """Of a round; no two rounds of two seeds share one."""
        return 1000 * self.seed + number

    def seam_of(self, number: int) -> seam.SeamConfig:
        """The seam run of a round."""
        flags = {
            "run_dir": str(self.folder(number) / "seam"),
            "policy": self.policy_before(number),
            "reward": self.reward,
            "data": self.data,
            "seed": self.seed_of(number),
        }
        return configs.load(seam.SeamConfig, self.seam_config, flags)

    def selected(self, number: int) -> pathlib.Path:
        """The prompts of a round."""
        kind = "random" if self.random else "seam"
        return self.folder(number) / "prompts" / f"{kind}-{self.drop:g}.jsonl"

    def rl_of(self, number: int) -> Any:
        """The RL run of a round."""
        return rounds.rl_part(
            self,
            number,
            data=[str(self.selected(number))],
            reward=self.reward,
            seed=self.seed_of(number),
        )


def run(config: SeamRoundsConfig) -> pathlib.Path:
    """Runs the rounds that are not done; returns run_dir."""
    opened = open_run(config.run_dir, config, holds_runs=True, may_change=("rounds",))
    with opened.lock:
        for number in range(1, config.rounds + 1):
            if not config.selected(number).exists():
                _select(config, number)
            title = f"round {number}: {config.rl}"
            rounds.run_part(title, rounds.RL[config.rl][1], config.rl_of(number))
    return opened.path


def _select(config: SeamRoundsConfig, number: int) -> None:
    measured = config.seam_of(number)
    seam.run(measured)
    seam_select.run(
        seam_select.SeamSelectConfig(
            run_dir=measured.run_dir,
            out=str(config.selected(number).parent),
            drop=[config.drop],
            estimator=measured.estimators[0],
            overwrite=True,
            seed=config.seed_of(number),
        )
    )
