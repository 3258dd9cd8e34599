"""Every recipe under configs/ loads, and names source, command and hardware."""

import importlib
import pathlib
import re

import pytest
import yaml

from rlhf_jax import config as configs
from rlhf_jax.__main__ import PROGRAMS
from rlhf_jax.models.presets import PRESETS

ROOT = pathlib.Path(__file__).parent.parent
RECIPES = sorted((ROOT / "configs").rglob("*.yaml"))
REWARD_RECIPES = [path for path in RECIPES if "reward" in path.parent.name]
# What a recipe may leave to the command line.
GIVEN = {
    "run_dir": "run",
    "out": "out",
    "model": "tiny",
    "data": "pairs.jsonl",
    "reward": "reward",
    "shifted": "sampled.jsonl",
    "pairs": "pairs.jsonl",
}


def name_of(path):
    return path.relative_to(ROOT / "configs").as_posix()


def config_type(path):
    program = PROGRAMS[path.parent.name]
    return getattr(importlib.import_module(program.module), program.config)


def load(path):
    """The config of a recipe, as the command line makes it."""
    kind = config_type(path)
    keys = set(yaml.safe_load(path.read_text()))
    missing = [key for key in kind.__dataclass_fields__ if key in GIVEN]
    more = [f"--{key}={GIVEN[key]}" for key in missing if key not in keys]
    return configs.parse(kind, [f"--config={path}", *more], prog="rlhf-jax")


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


@pytest.mark.parametrize("path", REWARD_RECIPES, ids=name_of)
def test_a_reward_recipe_repeats_no_default(path):
    kind = config_type(path)
    given = [f"--{k}={GIVEN[k]}" for k in kind.__dataclass_fields__ if k in GIVEN]
    plain = configs.parse(kind, given, prog="rlhf-jax")
    defaults = dict(leaves(configs.to_dict(plain)))
    for key, value in leaves(yaml.safe_load(path.read_text())):
        if key not in GIVEN:
            assert defaults[key] != value, f"{key}: {value!r} is the default"


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_recipe_names_its_source_its_command_and_its_hardware(path):
    header = path.read_text().split("\nmodel:")[0].split("\nbatch_size:")[0]
    header = "\n".join(line for line in header.splitlines() if line.startswith("#"))
    assert re.search(r"arXiv:\d{4}\.\d{5}", header)
    assert "Hardware:" in header
    assert f"rlhf-jax {path.parent.name} --config configs/{name_of(path)}" in header


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_recipes_model_is_a_preset_a_hub_id_or_a_directory(path):
    model = load(path).model
    assert model in PRESETS or re.fullmatch(r"[\w.-]+/[\w.-]+", model)
