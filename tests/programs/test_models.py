"""--model SPEC: every kind of source, wrong specs, fresh heads, adapters, meshes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.data import tokenizers
from rlhf_jax.io import run_dir
from rlhf_jax.models import hf, tensors
from rlhf_jax.models.config import ComputeConfig, LoraConfig
from rlhf_jax.models.lora import merge_lora, split_params
from rlhf_jax.models.parameters import unrolled
from rlhf_jax.programs import models
from rlhf_jax.sharding import MeshConfig, make_mesh
from rlhf_jax.testing import tiny_config, tiny_tokenizer

CONFIG = tiny_config(tie_word_embeddings=False)


def random_params(config=CONFIG, kind="causal", seed=0):
    rng = np.random.default_rng(seed)
    params: dict = {}
    for leaf in tensors.leaves(hf.table(config, kind), config, True):
        value = 0.1 * rng.normal(size=leaf.shape) + (leaf.path[-1] == "scale")
        tensors.insert(params, leaf.path, value.astype(np.float32))
    return params


def assert_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def save_run(path, kind, trained, *, lora=LoraConfig(), base=None, step=3, seed=0):
    """A run directory as sft and reward leave it."""
    import orbax.checkpoint as ocp

    path.mkdir()
    (path / "config.yaml").write_text(f"model: tiny\nseed: {seed}\n")
    run_dir.save_architecture(
        path, run_dir.Architecture(kind, CONFIG, lora, base), tiny_tokenizer()
    )
    with ocp.StandardCheckpointer() as writer:
        where = (path / "checkpoints" / str(step) / "params").absolute()
        writer.save(where, jax.tree.map(jnp.asarray, trained))
    return path


@pytest.fixture
def causal(tmp_path):
    """(spec, parameters) of a Hugging Face directory."""
    params = random_params()
    hf.export_hf(tmp_path / "hf", CONFIG, params)
    tokenizers.save_tokenizer(tiny_tokenizer(), tmp_path / "hf")
    return str(tmp_path / "hf"), params


# Wrong specs


@pytest.mark.parametrize(
    "spec,message",
    [
        (
            "llama3.1-8",
            r"not found.*nearest: llama3\.1-8b.*hub id \(expected OWNER/NAME",
        ),
        ("owner/not-in-the-cache", "not in the local cache.*hf download owner/not-in"),
        ("./missing/model.gguf", "not found. Tried a file or directory"),
    ],
)
def test_a_wrong_spec_lists_what_was_tried(spec, message):
    with pytest.raises(ValueError, match=message):
        models.resolve(spec)


def test_a_directory_of_something_else_is_named(tmp_path):
    with pytest.raises(ValueError, match="neither a run .* nor a Hugging Face model"):
        models.resolve(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="PEFT adapter: merge it"):
        models.resolve(str(tmp_path))


def test_a_file_of_another_kind_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="expected a .gguf or llama2.c .bin file"):
        models.resolve(str(path))


def test_a_tokenizer_larger_than_the_table_is_an_error(tmp_path):
    config = tiny_config(vocab_size=100)
    hf.export_hf(tmp_path, config, random_params(config))
    tokenizers.save_tokenizer(tiny_tokenizer(), tmp_path)
    with pytest.raises(ValueError, match="vocab_size 100, but the tokenizer's largest"):
        models.load_policy(str(tmp_path))


def test_a_reward_model_is_no_policy(tmp_path):
    params = random_params(kind="reward")
    hf.export_hf(tmp_path, CONFIG, params, kind="reward")
    with pytest.raises(
        ValueError, match="is a reward model; expected a language model"
    ):
        models.load_policy(str(tmp_path))


# Sources


def test_a_preset_has_random_weights_and_the_testbeds_tokenizer():
    model, params, tokenizer = models.load_policy("tiny", key=jax.random.key(1))
    _, again, _ = models.load_policy("tiny", key=jax.random.key(1))
    assert_equal(params, again)
    assert len(tokenizer) <= model.config.vocab_size


def test_a_hugging_face_directory_as_policy_and_reward_model(causal):
    spec, params = causal
    loaded = models.load_policy(spec)
    assert_equal(loaded.params, params)
    reward = models.load_reward_model(spec, key=jax.random.key(2))
    backbone = {k: v for k, v in params.items() if k != "lm_head"}
    assert_equal(reward.params["backbone"], backbone)
    head = np.asarray(reward.params["head"]["kernel"])
    assert head.shape == (32,)
    assert 0.5 < head.std() * np.sqrt(33) < 1.5
    _, other, _ = models.load_reward_model(spec, key=jax.random.key(3))
    assert not np.array_equal(head, other["head"]["kernel"])


def test_unrolled_layers_on_request(causal):
    spec, params = causal
    loaded = models.load_policy(spec, compute=ComputeConfig(scan_layers=False))
    assert_equal(loaded.params, unrolled(params))


def test_stories260k_loads_with_its_tokenizer(test_data):
    path = test_data / "models" / "stories260K.bin"
    model, params, tokenizer = models.load_policy(str(path))
    assert model.config.num_layers == 5
    assert tokenizer.decode(tokenizer("Once upon").input_ids[1:]) == "Once upon"
    reward = models.load_reward_model(str(path))
    assert_equal(reward.params["backbone"], params)


def test_fresh_adapters_change_nothing_yet(causal):
    spec, params = causal
    lora = LoraConfig(rank=2, targets=("q", "down"))
    loaded = models.load_policy(spec, lora=lora)
    assert loaded.params["layers"]["attention"]["q"]["lora_a"].shape == (2, 32, 2)
    assert np.any(loaded.params["layers"]["mlp"]["down"]["lora_a"])
    assert_equal(merge_lora(loaded.params, lora), params)


@pytest.mark.multi_device
@pytest.mark.parametrize("spec,scan_layers", [("causal", False), ("tiny", True)])
def test_sharded_over_eight_devices_is_the_same(spec, scan_layers, causal):
    spec = causal[0] if spec == "causal" else spec
    options = {
        "compute": ComputeConfig(scan_layers=scan_layers),
        "lora": LoraConfig(rank=4),
        "key": jax.random.key(0),
    }
    alone = models.load_reward_model(spec, **options).params
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    spread = models.load_reward_model(spec, mesh=mesh, **options).params
    assert jax.tree.structure(spread) == jax.tree.structure(alone)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), spread, alone
    )
    kernel = jax.tree.leaves(spread["backbone"])[0]
    assert kernel.sharding.mesh == mesh
    table = spread["backbone"]["embed"]["embedding"]
    assert len({str(shard.index) for shard in table.addressable_shards}) == 4


# Runs


def test_a_run_gives_its_best_checkpoint(tmp_path):
    params = random_params(kind="reward")
    run = save_run(tmp_path / "run", "reward", params)
    loaded = models.load_reward_model(str(run))
    assert_equal(loaded.params, params)
    assert loaded.tokenizer.chat_template == tiny_tokenizer().chat_template
    source = models.resolve(str(run))
    assert (source.kind, source.reward) == ("run", True)


def test_a_run_of_sft_becomes_the_backbone_of_a_reward_model(tmp_path):
    params = random_params()
    run = save_run(tmp_path / "run", "causal", params)
    assert_equal(models.load_policy(str(run)).params, params)
    loaded = models.load_reward_model(str(run))
    backbone = {k: v for k, v in params.items() if k != "lm_head"}
    assert_equal(loaded.params["backbone"], backbone)


def test_unrolled_checkpoints_are_stacked_again(tmp_path):
    params = random_params(kind="reward")
    run = save_run(tmp_path / "run", "reward", unrolled(params))
    assert_equal(models.load_reward_model(str(run)).params, params)


@pytest.mark.parametrize("base_of", ["hf", "run"])
def test_adapters_of_a_run_are_merged_into_its_base(base_of, causal, tmp_path):
    spec, params = causal
    if base_of == "run":
        spec = str(save_run(tmp_path / "base", "causal", params))
    lora = LoraConfig(rank=2)
    whole = models.load_reward_model(spec, lora=lora).params
    rng = np.random.default_rng(5)
    whole = jax.tree.map(
        lambda x: np.asarray(x) + 0.1 * rng.normal(size=x.shape).astype("f4"), whole
    )
    adapters, _ = split_params(whole, "lora")
    backbone = {k: v for k, v in params.items() if k != "lm_head"}
    joined = jax.tree.map(np.asarray, whole)
    joined = models.lora_lib.join_params(adapters, {"backbone": backbone})
    run = save_run(tmp_path / "run", "reward", adapters, lora=lora, base=spec)
    loaded = models.load_reward_model(str(run)).params
    expected = merge_lora(joined, lora)
    assert jax.tree.structure(loaded) == jax.tree.structure(expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), loaded, expected
    )
    np.testing.assert_array_equal(loaded["head"]["kernel"], whole["head"]["kernel"])


def test_a_probe_on_a_preset_finds_its_random_backbone_again(tmp_path):
    """Only the head was trained: the frozen leaves come from the run's seed."""
    key = jax.random.key(7)
    before = models.load_reward_model("tiny", key=key)
    head = {"head": {"kernel": np.arange(64, dtype=np.float32)}}
    run = save_run(tmp_path / "run", "reward", head, base="tiny", seed=7)
    what = run_dir.read_architecture(run)
    run_dir.save_architecture(
        run,
        run_dir.Architecture("reward", before.model.config, what.lora, "tiny"),
        tiny_tokenizer(),
    )
    after = models.load_reward_model(str(run)).params
    assert_equal(after["backbone"], before.params["backbone"])
    assert_equal(after["head"], head["head"])


def test_a_missing_base_is_named(tmp_path):
    head = {"head": {"kernel": np.zeros(32, np.float32)}}
    run = save_run(tmp_path / "run", "reward", head, base="./gone")
    with pytest.raises(ValueError, match=r"are those of its base: model './gone'"):
        models.load_reward_model(str(run))


def test_a_run_without_a_checkpoint_is_named(tmp_path):
    run = save_run(tmp_path / "run", "reward", random_params(kind="reward"))
    with pytest.raises(ValueError, match=r"no checkpoint of step 9; there are \[3\]"):
        models.load_reward_model(str(run), step=9)


def test_sources_name_their_files(causal):
    spec, _ = causal
    path = models.resolve(spec).path
    assert path is not None
    assert json.loads((path / "config.json").read_text())["model_type"] == "llama"
