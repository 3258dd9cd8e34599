"""Hugging Face checkpoints: parity with transformers, round trips, bad files."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlhf_jax.models import hf, tensors
from rlhf_jax.models.config import ComputeConfig, Llama3Scaling
from rlhf_jax.models.llama import Llama
from rlhf_jax.models.parameters import param_specs, unrolled
from rlhf_jax.sharding import MeshConfig, ShardingRules, make_mesh, shardings
from rlhf_jax.testing import tiny_config
from rlhf_jax.types import Sequences

SHORT = Llama3Scaling(factor=4.0, original_max_position_embeddings=16)
CONFIGS = {
    "tied": tiny_config(),
    "untied": tiny_config(tie_word_embeddings=False, rope_theta=5e5),
    "llama3": tiny_config(rope_scaling=SHORT, rope_theta=5e5, head_dim=16),
    "mha": tiny_config(num_kv_heads=4),
    "biases": tiny_config(
        attention_bias=True, attention_output_bias=True, mlp_bias=True
    ),
    "mistral": tiny_config(sliding_window=8),
    "qwen2": tiny_config(attention_bias=True, rms_norm_eps=1e-6),
    "qwen3": tiny_config(qk_norm=True, head_dim=16),
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def random_params(config, kind="causal", seed=0):
    """A tree of noise, norms around 1: no zero bias, no two rows alike."""
    rng = np.random.default_rng(seed)
    params: dict = {}
    for leaf in tensors.leaves(hf.table(config, kind), config, True):
        noise = 0.1 * rng.normal(size=leaf.shape)
        value = noise + (leaf.path[-1] == "scale")
        tensors.insert(params, leaf.path, value.astype(np.float32))
    return params


def random_ids(rows=2, length=24, seed=1):
    return np.random.default_rng(seed).integers(0, 512, (rows, length))


def sequences(ids):
    ids = np.asarray(ids, np.int32)
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    ones = np.ones_like(ids)
    return Sequences(
        tokens=ids, positions=positions, segment=ones, completion_mask=ones > 0
    )


def logits(config, params, ids):
    model = Llama(config)
    return jax.jit(lambda p, s: model.apply({"params": p}, s, method="everything"))(
        params, sequences(ids)
    )


def assert_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.fixture
def saved(tmp_path):
    """(directory, config, parameters) of an exported untied model."""
    config = CONFIGS["untied"]
    params = random_params(config)
    hf.export_hf(tmp_path, config, params, tokens=TOKENS)
    return tmp_path, config, params


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_those_of_transformers(name, tmp_path):
    torch = pytest.importorskip("torch", reason="torch: the extra `parity`")
    import transformers

    config = CONFIGS[name]
    params = random_params(config)
    hf.export_hf(tmp_path, config, params, tokens=TOKENS)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = random_ids()
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(logits(config, params, ids), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["llama3", "qwen2", "qwen3"])
def test_a_model_saved_by_transformers_loads(name, tmp_path):
    torch = pytest.importorskip("torch", reason="torch: the extra `parity`")
    import transformers

    hf.export_hf(tmp_path, CONFIGS[name], random_params(CONFIGS[name]))
    shape = transformers.AutoConfig.from_pretrained(tmp_path)
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(shape).eval()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    assert (tmp_path / "theirs" / hf.INDEX).exists()
    config, params = hf.load_hf(tmp_path / "theirs")
    assert config == CONFIGS[name]
    ids = random_ids()
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(logits(config, params, ids), expected, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_keeps_every_bit(name, tmp_path):
    config = CONFIGS[name]
    params = random_params(config)
    hf.export_hf(tmp_path / "a", config, params, tokens=TOKENS)
    loaded, again = hf.load_hf(tmp_path / "a")
    assert loaded == config
    assert_equal(again, params)
    hf.export_hf(tmp_path / "b", config, again, tokens=TOKENS)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_reward_model_round_trip(tmp_path):
    params = random_params(tiny_config(), "reward")
    hf.export_hf(tmp_path, tiny_config(), params, kind="reward", tokens=TOKENS)
    assert hf.has_reward_head(tmp_path)
    assert_equal(hf.load_hf(tmp_path)[1], params)
    _, backbone = hf.load_hf(tmp_path, kind="backbone")
    assert_equal(backbone, params["backbone"])


def test_a_causal_checkpoint_loads_as_a_backbone(saved):
    directory, _, params = saved
    _, backbone = hf.load_hf(directory, kind="backbone")
    assert_equal(backbone, {k: v for k, v in params.items() if k != "lm_head"})


def test_unrolled_layers_load_and_export_the_same(saved, tmp_path):
    directory, config, params = saved
    _, loaded = hf.load_hf(directory, scan_layers=False)
    assert_equal(loaded, unrolled(params))
    hf.export_hf(tmp_path / "b", config, loaded, tokens=TOKENS)
    assert_equal(hf.load_hf(tmp_path / "b")[1], params)


def test_files_above_the_limit_are_split_and_indexed(saved, tmp_path):
    directory, config, params = saved
    hf.export_hf(tmp_path / "b", config, params, max_shard_bytes=20_000, tokens=TOKENS)
    files = sorted((tmp_path / "b").glob("*.safetensors"))
    assert len(files) > 3 and files[0].name.startswith("model-00001-of-000")
    index = json.loads((tmp_path / "b" / hf.INDEX).read_text())
    whole = load_file(directory / "model.safetensors")
    assert set(index["weight_map"]) == set(whole)
    total = sum(array.nbytes for array in whole.values())
    assert index["metadata"]["total_size"] == total
    assert_equal(hf.load_hf(tmp_path / "b")[1], params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_files_become_float32_masters(dtype, saved, tmp_path):
    _, config, params = saved
    hf.export_hf(tmp_path / "b", config, params, dtype=dtype, tokens=TOKENS)
    _, loaded = hf.load_hf(tmp_path / "b")
    rounded = jax.tree.map(
        lambda x: x.astype(jnp.dtype(dtype)).astype("float32"), params
    )
    assert_equal(loaded, rounded)
    _, half = hf.load_hf(tmp_path / "b", dtype=dtype)
    assert {x.dtype for x in jax.tree.leaves(half)} == {jnp.dtype(dtype)}


def test_names_of_a_bare_backbone_are_understood(saved):
    directory, _, params = saved
    path = directory / "model.safetensors"
    bare = {
        name.removeprefix("model."): array
        for name, array in load_file(path).items()
        if name != "lm_head.weight"
    }
    save_file(bare, path)
    _, loaded = hf.load_hf(directory, kind="backbone")
    assert_equal(loaded, {k: v for k, v in params.items() if k != "lm_head"})


# On several devices


def sharded_over(mesh, tree):
    return shardings(mesh, param_specs(tree, ShardingRules()))


@pytest.mark.multi_device
@pytest.mark.parametrize("scan_layers", [True, False])
def test_a_sharded_load_equals_the_whole(scan_layers, saved):
    directory, _, params = saved
    params = params if scan_layers else unrolled(params)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    places = sharded_over(mesh, params)
    _, loaded = hf.load_hf(directory, shardings=places, scan_layers=scan_layers)
    assert_equal(loaded, params)
    assert jax.tree.map(lambda x: x.sharding, loaded) == places


@pytest.mark.multi_device
def test_each_device_reads_its_slice_alone(saved, monkeypatch):
    """No read is larger than one device's slice of one layer (or of a whole table)."""
    directory, config, params = saved
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    sizes: list[int] = []
    plain = tensors.to_ours

    def spy(entry, axis, name, index, read):
        def counted(name, index):
            block = read(name, index)
            sizes.append(block.size)
            return block

        return plain(entry, axis, name, index, counted)

    monkeypatch.setattr(tensors, "to_ours", spy)
    hf.load_hf(directory, shardings=sharded_over(mesh, params))
    largest = config.vocab_size * config.hidden_size // 8
    assert max(sizes) == largest
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    norms = sum(leaf.size for leaf in jax.tree.leaves(params) if leaf.shape[-1] == 32)
    assert sum(sizes) <= total + norms  # nothing sharded is read twice


@pytest.mark.multi_device
def test_a_sharded_tree_exports_the_same_file(saved, tmp_path):
    directory, config, params = saved
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    spread = jax.device_put(params, sharded_over(mesh, params))
    hf.export_hf(tmp_path / "b", config, spread, tokens=TOKENS)
    name = "model.safetensors"
    assert (directory / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


# Bad input


def rewrite(directory: pathlib.Path, change):
    path = directory / "model.safetensors"
    arrays = load_file(path)
    change(arrays)
    save_file(arrays, path)


@pytest.mark.parametrize("size", [0, 4, 20, 5000, -1])
def test_a_truncated_file_is_named(size, saved):
    path = saved[0] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"model\.safetensors: truncated, corrupt"):
        hf.load_hf(saved[0])


def test_a_corrupt_header_is_named(saved):
    path = saved[0] / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8:40] = b"x" * 32
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"model\.safetensors: truncated, corrupt"):
        hf.load_hf(saved[0])


def test_a_wrong_shape_names_tensor_expected_and_got(saved):
    def change(arrays):
        arrays["model.layers.1.mlp.up_proj.weight"] = np.zeros((64, 31), np.float32)

    rewrite(saved[0], change)
    message = (
        r"layers\.1\.mlp\.up_proj\.weight: expected shape \[64, 32\].*got \[64, 31\]"
    )
    with pytest.raises(ValueError, match=message):
        hf.load_hf(saved[0])


def test_missing_tensors_are_listed(saved):
    rewrite(saved[0], lambda arrays: arrays.pop("model.norm.weight"))
    with pytest.raises(ValueError, match=r"1 of 21 tensors are missing: model\.norm"):
        hf.load_hf(saved[0])


def test_unexpected_tensors_are_listed(saved):
    def change(arrays):
        arrays["model.layers.2.mlp.up_proj.weight"] = np.zeros((64, 32), np.float32)

    rewrite(saved[0], change)
    with pytest.raises(ValueError, match=r"1 unexpected tensors.*layers\.2\.mlp\.up"):
        hf.load_hf(saved[0])


def test_old_rope_buffers_are_no_surprise(saved):
    def change(arrays):
        name = "model.layers.0.self_attn.rotary_emb.inv_freq"
        arrays[name] = np.zeros(4, np.float32)

    _, before = hf.load_hf(saved[0])
    rewrite(saved[0], change)
    _, after = hf.load_hf(saved[0])
    tables = (tree["embed"]["embedding"] for tree in (after, before))
    np.testing.assert_array_equal(*tables)


def test_integer_weights_are_refused(saved):
    rewrite(
        saved[0],
        lambda a: a.update({"model.norm.weight": np.zeros(32, np.int8)}),
    )
    with pytest.raises(ValueError, match="expected one of BF16, F16, F32, F64, got I8"):
        hf.load_hf(saved[0])


def test_missing_shards_are_listed(saved, tmp_path):
    _, config, params = saved
    out = tmp_path / "b"
    hf.export_hf(out, config, params, max_shard_bytes=20_000, tokens=TOKENS)
    files = sorted(out.glob("*.safetensors"))
    files[1].unlink()
    with pytest.raises(ValueError, match=f"1 of {len(files)} shards.*{files[1].name}"):
        hf.load_hf(out)


def test_pickled_weights_are_pointed_out(saved):
    (saved[0] / "model.safetensors").rename(saved[0] / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin are pickled weights"):
        hf.load_hf(saved[0])


def test_a_broken_config_is_named(saved):
    (saved[0] / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
        hf.load_hf(saved[0])


def test_a_two_label_classifier_is_no_reward_model(tmp_path):
    params = random_params(tiny_config(), "reward")
    hf.export_hf(tmp_path, tiny_config(), params, kind="reward")
    rewrite(tmp_path, lambda a: a.update({"score.weight": np.zeros((2, 32), "f4")}))
    with pytest.raises(ValueError, match=r"score\.weight: expected shape \[1, 32\]"):
        hf.load_hf(tmp_path)


def test_export_refuses_adapters_and_wrong_trees(saved, tmp_path):
    _, config, params = saved
    adapted = jax.tree.map(lambda x: x, params)
    adapted["layers"]["mlp"]["up"]["lora_a"] = np.zeros((2, 32, 4), np.float32)
    with pytest.raises(ValueError, match="merge them first"):
        hf.export_hf(tmp_path / "b", config, adapted)
    with pytest.raises(ValueError, match=r"parameter lm_head/kernel: missing"):
        less = {k: v for k, v in params.items() if k != "lm_head"}
        hf.export_hf(tmp_path / "b", config, less)
    with pytest.raises(ValueError, match=r"1 parameters have no place.*head/kernel"):
        hf.export_hf(
            tmp_path / "b", config, {**params, "head": {"kernel": np.ones(32)}}
        )
    with pytest.raises(ValueError, match=r"final_norm/scale: expected shape \(32,\)"):
        hf.export_hf(
            tmp_path / "b", config, {**params, "final_norm": {"scale": np.ones(31)}}
        )


def test_compute_layout_is_the_models(saved):
    """What load_hf gives fits Llama with and without scanned layers."""
    directory, config, params = saved
    ids = random_ids()
    _, flat = hf.load_hf(directory, scan_layers=False)
    model = Llama(config, ComputeConfig(scan_layers=False))
    got = model.apply({"params": flat}, sequences(ids), method="everything")
    np.testing.assert_allclose(got, logits(config, params, ids), atol=1e-5)
