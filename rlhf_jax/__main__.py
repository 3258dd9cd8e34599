"""The command line: `rlhf-jax PROGRAM ...` or `python -m rlhf_jax PROGRAM ...`.

A table from name to module; each module has a config dataclass and `run(config)`.
Modules are imported when they are called, so `--help` is quick.
"""

import importlib
import logging
import os
import pathlib
import sys
from typing import NamedTuple


class Program(NamedTuple):
    """Where a program lives and what it does, in a line."""

    module: str
    config: str
    summary: str


PROGRAMS = {
    "quickstart": Program(
        "rlhf_jax.studies.quickstart", "QuickstartConfig", "the main job, embedded data"
    ),
    "data": Program(
        "rlhf_jax.programs.data", "DataProgramConfig", "show what a run would train on"
    ),
    "sft": Program(
        "rlhf_jax.programs.sft", "SftConfig", "supervised fine-tuning of a policy"
    ),
    "reward": Program(
        "rlhf_jax.programs.reward", "RewardConfig", "train a reward model on pairs"
    ),
    "meta-reward": Program(
        "rlhf_jax.programs.meta_reward",
        "MetaRewardConfig",
        "a reward model that tells a shifted policy's completions apart (MetaRM)",
    ),
    "meta-rounds": Program(
        "rlhf_jax.programs.meta_rounds",
        "MetaRoundsConfig",
        "rounds of sampling, meta-reward and RL",
    ),
    "strength": Program(
        "rlhf_jax.programs.strength",
        "StrengthConfig",
        "preference strength of pairs; flip, soften, drop, margins",
    ),
    "curate": Program(
        "rlhf_jax.programs.curate",
        "CurateConfig",
        "pairs filtered, weighed, bounded and augmented",
    ),
    "seam": Program(
        "rlhf_jax.programs.seam",
        "SeamConfig",
        "how well a policy and a reward model fit together, prompt by prompt",
    ),
    "seam-select": Program(
        "rlhf_jax.programs.seam_select",
        "SeamSelectConfig",
        "RL prompts without those of the lowest SEAM",
    ),
    "seam-augment": Program(
        "rlhf_jax.programs.seam_augment",
        "SeamAugmentConfig",
        "SFT rows and pairs of the prompts of the lowest SEAM",
    ),
    "seam-rounds": Program(
        "rlhf_jax.programs.seam_rounds",
        "SeamRoundsConfig",
        "RL whose prompts are selected anew as the policy moves",
    ),
    "judge": Program(
        "rlhf_jax.programs.judge",
        "JudgeConfig",
        "which of two completions is better, and how far to trust the judge",
    ),
    "attributes": Program(
        "rlhf_jax.programs.attributes",
        "AttributesConfig",
        "a reward made of rated attributes and a gate, on frozen states",
    ),
    "dpo": Program(
        "rlhf_jax.programs.dpo", "DpoConfig", "train a policy on pairs, no reward model"
    ),
    "rloo": Program("rlhf_jax.programs.rloo", "RlooConfig", "train a policy with RLOO"),
    "ppo": Program("rlhf_jax.programs.ppo", "PpoConfig", "train a policy with PPO"),
    "generate": Program(
        "rlhf_jax.programs.generate", "GenerateConfig", "prompts in, completions out"
    ),
    "score": Program("rlhf_jax.programs.score", "ScoreConfig", "texts in, rewards out"),
    "serve": Program(
        "rlhf_jax.programs.serve", "ServeConfig", "a reward model behind HTTP"
    ),
    "evaluate": Program(
        "rlhf_jax.programs.evaluate",
        "EvaluateConfig",
        "accuracy, tau, calibration, RM-Bench, RewardBench",
    ),
    "import": Program(
        "rlhf_jax.programs.import_",
        "ImportConfig",
        "GGUF and other checkpoints to safetensors",
    ),
    "export": Program(
        "rlhf_jax.programs.export",
        "ExportConfig",
        "a run to a directory that transformers loads",
    ),
}

STUDIES = {
    "bsr-rlhf": Program(
        "rlhf_jax.studies.bsr_rlhf",
        "BsrRlhfConfig",
        "RLOO under a Bradley-Terry and under a BSR reward model",
    ),
    "denoise": Program(
        "rlhf_jax.studies.denoise",
        "DenoiseConfig",
        "flipped labels found by preference strength, and what cleaning is worth",
    ),
    "meta-reward": Program(
        "rlhf_jax.studies.meta_reward",
        "MetaStudyConfig",
        "MetaRM beside Bradley-Terry on completions of a shifted policy",
    ),
    "meta-rounds": Program(
        "rlhf_jax.studies.meta_rounds",
        "MetaRoundsStudyConfig",
        "rounds of MetaRM and RLOO beside one reward model, by label noise",
    ),
    "heads": Program(
        "rlhf_jax.studies.heads",
        "HeadsConfig",
        "BT, hinge, norm, DR and BSR as heads of a frozen model, real data too",
    ),
    "seam-filter": Program(
        "rlhf_jax.studies.seam_filter",
        "SeamFilterConfig",
        "RLOO without the prompts of the lowest SEAM, and its controls",
    ),
    "seam-augment": Program(
        "rlhf_jax.studies.seam_augment",
        "SeamAugmentStudyConfig",
        "policy and reward model taught on prompts of the lowest SEAM, then RLOO",
    ),
    "saturation": Program(
        "rlhf_jax.studies.saturation",
        "SaturationConfig",
        "RLOO over a grid of SFT and reward model qualities, seeds side by side",
    ),
    "attacks": Program(
        "rlhf_jax.studies.attacks",
        "AttacksConfig",
        "random perturbations beside searches that know the reward model",
    ),
    "objectives": Program(
        "rlhf_jax.studies.objectives",
        "ObjectivesConfig",
        "BT, hinge, norm, DR and BSR, whole models trained on real pairs",
    ),
    "domains": Program(
        "rlhf_jax.studies.domains",
        "DomainsConfig",
        "heads trained on each domain and judged on each, real data too",
    ),
    "detectors": Program(
        "rlhf_jax.studies.detectors",
        "DetectorsConfig",
        "which signal finds flipped labels, with how many reward models",
    ),
    "ablation": Program(
        "rlhf_jax.studies.ablation",
        "AblationConfig",
        "flip, margin and SimCSE together, and each taken out in turn",
    ),
    "scenarios": Program(
        "rlhf_jax.studies.scenarios",
        "ScenariosConfig",
        "BT, hinge, norm, DR and BSR on four disjoint scenarios",
    ),
    "contrastive": Program(
        "rlhf_jax.studies.contrastive",
        "ContrastiveStudyConfig",
        "SimCSE and SwAV beside Bradley-Terry, out of distribution",
    ),
    "over-optimisation": Program(
        "rlhf_jax.studies.over_optimisation",
        "OverOptimisationConfig",
        "gold against proxy reward under RL, by annotator bias",
    ),
}


def main(argv: list[str] | None = None) -> None:
    """Runs a program; exits 2 on bad input, 1 on a failed run, 128 + n on signal n."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return
    if argv[0] == "--version":
        print(importlib.import_module("importlib.metadata").version("rlhf-jax"))
        return
    name, argv = argv[0], argv[1:]
    if name == "study":
        if not argv or argv[0] not in STUDIES:
            _fail(_unknown_study(argv))
        name, argv = f"study {argv[0]}", argv[1:]
    elif name not in PROGRAMS:
        _fail(_unknown(name))
    _keep_compiled()
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax's running commentary
    program = PROGRAMS.get(name) or STUDIES[name.removeprefix("study ")]
    module = importlib.import_module(program.module)
    configs = importlib.import_module("rlhf_jax.config")
    config = configs.parse(
        getattr(module, program.config), argv, prog=f"rlhf-jax {name}"
    )
    try:
        module.run(config)
    except ValueError as error:
        _fail(f"rlhf-jax {name}: error: {error}")
    except FloatingPointError as error:
        _fail(f"rlhf-jax {name}: stopped: {error}", code=1)
    except KeyboardInterrupt:
        _fail(f"rlhf-jax {name}: interrupted", code=130)
    except OSError as error:  # a full disk, a missing permission, a closed pipe
        _fail(f"rlhf-jax {name}: stopped: {error}", code=1)


def usage() -> str:
    """The list of programs."""
    summaries = {name: program.summary for name, program in PROGRAMS.items()}
    summaries["study"] = f"an experiment: {', '.join(STUDIES)}"
    width = max(map(len, summaries))
    lines = [f"  {name:{width}}  {summary}" for name, summary in summaries.items()]
    return "\n".join(
        [
            "usage: rlhf-jax PROGRAM [options]",
            "",
            "programs:",
            *lines,
            "",
            "rlhf-jax PROGRAM --help lists a program's options",
        ]
    )


def _keep_compiled() -> None:
    """Compiled programs stay on disk, so that a shape's second run starts at once.

    JAX_COMPILATION_CACHE_DIR names another place.
    """
    import jax

    if jax.config.values["jax_compilation_cache_dir"] is None:
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
        jax.config.update(
            "jax_compilation_cache_dir", str(cache / "rlhf_jax" / "compiled")
        )


def _unknown(name: str) -> str:
    import difflib

    near = difflib.get_close_matches(name, [*PROGRAMS, "study"], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"rlhf-jax: error: unknown program {name!r}{hint}\n{usage()}"


def _unknown_study(argv: list[str]) -> str:
    lines = [f"  {name}  {program.summary}" for name, program in STUDIES.items()]
    got = repr(argv[0]) if argv else "none"
    return "\n".join(
        [
            f"rlhf-jax study: error: expected the name of a study, got {got}",
            "",
            "studies:",
            *lines,
            "",
            "rlhf-jax study NAME --help lists its options",
        ]
    )


def _fail(message: str, code: int = 2) -> None:
    print(message, file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
