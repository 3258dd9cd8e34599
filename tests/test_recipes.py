"""Every recipe under configs/ loads, and names source, command and hardware."""

import functools
import importlib
import math
import pathlib
import re

import numpy as np
import pytest
import yaml

from rlhf_jax import config as configs
from rlhf_jax.__main__ import PROGRAMS
from rlhf_jax.algorithms.optimizer import make_schedule
from rlhf_jax.data.encode import Encoder
from rlhf_jax.models.presets import PRESETS
from rlhf_jax.testbed import tokenizer

ROOT = pathlib.Path(__file__).parent.parent
RECIPES = sorted((ROOT / "configs").rglob("*.yaml"))
# What a recipe may leave to the command line.
GIVEN = {
    "run_dir": "run",
    "out": "out",
    "model": "tiny",
    "policy": "tiny",
    "reward_start": "tiny",
    "data": "pairs.jsonl",
    "reward": "reward",
    "shifted": "sampled.jsonl",
    "pairs": "pairs.jsonl",
    "prompts": "prompts.jsonl",
}
MOSS_RM = {
    "epochs": 1.0,
    "rows.max_length": 2048,
    "optimizer.learning_rate": 5e-6,
    "optimizer.beta1": 0.9,
    "optimizer.beta2": 0.95,
    "optimizer.eps": 1e-6,
    "optimizer.weight_decay": 0.0,
}
CONTRASTIVE = {**MOSS_RM, "batch_size": 16, "compute.dropout": 0.05}
BSR = {
    "loss": "bradley_terry",
    "regularizers": ["1e-3*batch_sum_to_zero?scale=official&num_groups=8"],
    "batch_size": 128,
    "epochs": 1.0,
    "rows.max_length": 2048,
    "optimizer.schedule": "linear",
    "optimizer.warmup": 0.05,
    "optimizer.final_scale": 0.0,
}
NUCLEUS = {
    "sampling.temperature": 0.8,
    "sampling.top_p": 0.9,
    "sampling.repetition_penalty": 1.1,
    "sampling.penalise_prompt": False,
}
PPO_MAX = {
    **NUCLEUS,
    "sampling.max_new_tokens": 512,
    "batch_size": 32,
    "steps": 2000,
    "loss.clip_eps": 0.2,
    "loss.value_clip": 0.2,
    "loss.gamma": 1.0,
    "loss.gae_lambda": 0.95,
    "loss.scores": "scale",
    "loss.whiten": False,
    "optimizer.learning_rate": 5e-7,
    "optimizer.beta2": 0.95,
    "optimizer.eps": 1e-6,
    "critic_optimizer.learning_rate": 1.5e-6,
    "critic_optimizer.beta2": 0.95,
    "critic_optimizer.eps": 1e-8,
}
RLOO = {
    "batch_size": 128,
    "minibatches": 4,
    "accum_steps": 2,
    "epochs": 1,
    "sampling.num_samples": 2,
    "sampling.max_new_tokens": 1024,
    "rows.max_prompt_length": 512,
    "loss.variant": "sequence",
    "loss.kl": "reward",
    "loss.kl_coef": 0.05,
    "loss.clip_eps": 0.2,
    "optimizer.schedule": "linear",
    "optimizer.warmup": 0.03,
}
# The papers' numbers, written down a second time: many are defaults of a program, and a
# default that moves must not take a recipe with it.
PUBLISHED = {
    "reward/llama2-7b-moss-rm.yaml": {**MOSS_RM, "batch_size": 32},
    "reward/llama2-7b-simcse.yaml": CONTRASTIVE,
    "reward/llama2-7b-simcse-diff.yaml": CONTRASTIVE,
    "reward/llama2-7b-swav.yaml": CONTRASTIVE,
    "reward/llama2-7b-swav-diff.yaml": CONTRASTIVE,
    "reward/llama2-7b-seam-rm.yaml": {
        "batch_size": 32,
        "epochs": 1.0,
        "rows.max_length": 512,
        "optimizer.learning_rate": 1.41e-5,
        "optimizer.schedule": "linear",
        "optimizer.weight_decay": 1e-3,
        "lora.rank": 8,
        "lora.alpha": 32.0,
        "lora.dropout": 0.1,
        "compute.dtype": "bfloat16",
    },
    "reward/llama3.2-1b-bsr.yaml": {**BSR, "optimizer.learning_rate": 5e-6},
    "reward/qwen2.5-1.5b-bsr.yaml": {**BSR, "optimizer.learning_rate": 5e-6},
    "reward/llama3.2-3b-bsr.yaml": {**BSR, "optimizer.learning_rate": 3e-6},
    "reward/qwen2.5-3b-bsr.yaml": {**BSR, "optimizer.learning_rate": 3e-6},
    "reward/qwen2.5-7b-bsr.yaml": {**BSR, "optimizer.learning_rate": 2e-6},
    "reward/llama3.1-8b-skywork-bsr.yaml": {**BSR, "optimizer.learning_rate": 2e-6},
    "meta-reward/llama2-7b-metarm.yaml": {
        "batch_size": 16,
        "epochs": 1.0,
        "inner.batch_size": 16,
        "inner.learning_rate": 5e-6,
        "inner.second_order": False,
        "inner.normalise": False,
        "optimizer.learning_rate": 5e-6,
    },
    "meta-rounds/llama2-7b-metarm.yaml": {
        **NUCLEUS,
        "rounds": 4,
        "rl": "ppo",
        "sampling.num_samples": 5,
    },
    "strength/llama2-7b-strength.yaml": {
        **MOSS_RM,
        "members": 10,
        "folds": 0,
        "standardise": False,
        "batch_size": 32,
    },
    "sft/llama3.2-1b-bsr.yaml": {
        "batch_size": 512,
        "epochs": 1.0,
        "optimizer.learning_rate": 1e-5,
        "optimizer.schedule": "cosine",
        "optimizer.warmup": 0.1,
    },
    "ppo/llama2-7b-ppo-max.yaml": {**PPO_MAX, "loss.kl_coef": 0.01},
    "ppo/llama2-7b-metarm.yaml": {
        **PPO_MAX,
        "sampling.num_samples": 16,
        "loss.kl_coef": 0.05,
        "loss.score_clip": 0.8,
    },
    "rloo/qwen2.5-1.5b-bsr.yaml": {
        **RLOO,
        "optimizer.learning_rate": 2e-6,
        "steps": 5 * 12_800 // 128,
    },
    "rloo/qwen2.5-1.5b-skywork-bsr.yaml": {
        **RLOO,
        "optimizer.learning_rate": 1e-6,
        "steps": math.ceil(30_000 / 128),
    },
}
# beta and, for SwAV, the number of prototypes.
CONTRASTIVE_WEIGHTS = {
    "simcse": (1.0, 0),
    "simcse-diff": (1.0, 0),
    "swav": (0.1, 50),
    "swav-diff": (0.5, 20),
}


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    """Recipes name other files from the root of the repository."""
    monkeypatch.chdir(ROOT)


def name_of(path):
    return path.relative_to(ROOT / "configs").as_posix()


def config_type(path):
    program = PROGRAMS[path.parent.name]
    return getattr(importlib.import_module(program.module), program.config)


@functools.cache
def load(path):
    """The config of a recipe, as the command line makes it."""
    kind = config_type(path)
    keys = set(yaml.safe_load(path.read_text()))
    missing = [key for key in kind.__dataclass_fields__ if key in GIVEN]
    more = [f"--{key}={GIVEN[key]}" for key in missing if key not in keys]
    return configs.parse(kind, [f"--config={path}", *more], prog="rlhf-jax")


@functools.cache
def defaults(kind):
    """Every value of a program that is given no recipe."""
    given = [f"--{k}={GIVEN[k]}" for k in kind.__dataclass_fields__ if k in GIVEN]
    plain = configs.parse(kind, given, prog="rlhf-jax")
    return dict(leaves(configs.to_dict(plain)))


def leaves(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_recipe_loads_with_the_values_it_holds(path):
    found = dict(leaves(configs.to_dict(load(path))))
    for key, value in leaves(yaml.safe_load(path.read_text())):
        assert found[key] == value, key


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_recipe_repeats_no_default(path):
    usual = defaults(config_type(path))
    for key, value in leaves(yaml.safe_load(path.read_text())):
        if key not in GIVEN:
            assert usual[key] != value, f"{key}: {value!r} is the default"


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_recipe_names_its_source_its_command_and_its_hardware(path):
    lines = path.read_text().splitlines()
    header = "\n".join(line for line in lines if line.startswith("#"))
    assert re.search(r"arXiv:\d{4}\.\d{5}", header)
    assert "Hardware:" in header
    assert f"rlhf-jax {path.parent.name} --config configs/{name_of(path)}" in header


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_files_that_a_recipe_names_are_there(path):
    beside = re.findall(r"[\w./-]+\.(?:yaml|jinja)", path.read_text())
    for name in beside:
        here = ROOT if name.startswith("configs/") else path.parent
        assert (here / name).is_file(), name


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_recipes_model_is_a_preset_a_hub_id_or_a_directory(path):
    config = load(path)
    model = config.policy if path.parent.name == "meta-rounds" else config.model
    assert model in PRESETS or re.fullmatch(r"[\w.-]+/[\w.-]+", model)


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_recipes_objective_does_not_depend_on_the_hardware(path):
    for regularizer in yaml.safe_load(path.read_text()).get("regularizers", []):
        assert "devices" not in regularizer


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_has_the_published_values(name):
    found = dict(leaves(configs.to_dict(load(ROOT / "configs" / name))))
    for key, value in PUBLISHED[name].items():
        assert found[key] == value, key


@pytest.mark.parametrize("name", CONTRASTIVE_WEIGHTS)
def test_a_contrastive_recipe_has_the_papers_weight_and_prototypes(name):
    contrastive = load(ROOT / f"configs/reward/llama2-7b-{name}.yaml").contrastive
    found = (contrastive.weight, contrastive.prototypes)
    assert found == CONTRASTIVE_WEIGHTS[name]


def published_rate(step, warmup=100):
    """MOSS-RLHF's factor on the peak at a step, from 0."""
    return max(step / warmup, 0.1) if step < warmup else math.sqrt(warmup) / step**0.5


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        *((f"reward/llama2-7b-{n}", 1000) for n in ("moss-rm", *CONTRASTIVE_WEIGHTS)),
        ("strength/llama2-7b-strength", 1000),
        ("ppo/llama2-7b-ppo-max", 2000),
        ("ppo/llama2-7b-metarm", 2000),
    ],
)
def test_learning_rates_are_the_published_ones_at_every_step(name, steps):
    config = load(ROOT / f"configs/{name}.yaml")
    optimizers = [config.optimizer, getattr(config, "critic_optimizer", None)]
    for optimizer in filter(None, optimizers):
        rate = make_schedule(optimizer, steps)
        found = np.asarray(rate(np.arange(steps))) / optimizer.learning_rate
        published = np.array([published_rate(step) for step in range(steps)])
        np.testing.assert_allclose(found[100:], published[100:], rtol=1e-5)
        # Ours rises one step ahead, so that no step is lost on a rate of 0; the script
        # holds its rate at a tenth of the peak for the first ten.
        np.testing.assert_allclose(found[10:100], published[10:100] + 0.01, rtol=1e-5)
        np.testing.assert_allclose(found[:10], np.arange(1, 11) / 100, rtol=1e-5)


def test_the_template_of_seam_writes_questions_and_answers():
    encoder = Encoder(
        tokenizer.testbed_tokenizer(), "configs/reward/question-answer.jinja"
    )
    item = encoder.encode("why?", "so it is.")
    prompt, answer = encoder.decode(item.prompt), encoder.decode(item.completion)
    bos = encoder.tokenizer.bos_token or ""
    assert prompt.removeprefix(bos) == "Question: why?\n\nAnswer:"
    assert answer == f" so it is.{encoder.tokenizer.eos_token}"
    turns = [
        {"role": "user", "content": "why?"},
        {"role": "assistant", "content": "so."},
        {"role": "user", "content": "and?"},
    ]
    again = encoder.decode(encoder.prompt(turns)).removeprefix(bos)
    assert again == "Question: why?\n\nAnswer: so.\n\nQuestion: and?\n\nAnswer:"
    with pytest.raises(ValueError, match="this turn is of the system"):
        encoder.prompt([{"role": "system", "content": "Be kind."}, *turns])
