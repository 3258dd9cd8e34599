"""`--model SPEC` -> model, parameters and tokenizer, whatever the source is.

    directory with model/           a run: its best checkpoint, else the newest
    directory with config.json      Hugging Face
    FILE.gguf, FILE.bin             llama.cpp, llama2.c
    a name in models/presets.py     random weights
    OWNER/NAME[@REVISION]           Hugging Face hub

`resolve` says which, `load_policy` and `load_reward_model` do the rest: parameters
are read or created sharded, adapters of a run merged, a missing reward head fresh.
"""

import dataclasses
import difflib
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import yaml
from flax import traverse_util
from jax.sharding import Mesh

from rlhf_jax.data import tokenizers
from rlhf_jax.io import checkpoint, hub, run_dir
from rlhf_jax.models import gguf, heads, hf, llama2c
from rlhf_jax.models import lora as lora_lib
from rlhf_jax.models.config import ComputeConfig, LlamaConfig, LoraConfig
from rlhf_jax.models.llama import Llama, init_llama
from rlhf_jax.models.parameters import stacked, unrolled
from rlhf_jax.models.presets import PRESETS
from rlhf_jax.models.tensors import is_stacked
from rlhf_jax.programs import sharded
from rlhf_jax.sharding import ShardingRules

Where = Callable[[Any], Any] | None
"""Shapes -> shardings; None = the default device."""
_MODULES = {"causal": Llama, "reward": heads.RewardModel}


@dataclasses.dataclass(frozen=True)
class Source:
    """What a SPEC turned out to be."""

    kind: str
    """run, hf, gguf, llama2c or preset."""
    spec: str
    path: pathlib.Path | None
    """The directory or file; None for a preset."""
    config: LlamaConfig
    reward: bool
    """Whether it has a reward head."""
    run: run_dir.Architecture | None = None
    """What the run says of its checkpoints."""


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model ready for use; also unpacks as (model, params, tokenizer)."""

    model: Any
    """Llama or RewardModel."""
    params: Any
    tokenizer: Any

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.params, self.tokenizer))


def resolve(spec: str) -> Source:
    """What a SPEC names; downloads a hub id that is not in the cache.

    Raises:
        ValueError: nothing of that name; lists what was tried.
    """
    path = pathlib.Path(spec).expanduser()
    if path.is_dir():
        return _directory(spec, path)
    if path.is_file():
        return _file(spec, path)
    if spec in PRESETS:
        return Source("preset", spec, None, PRESETS[spec], False)
    if path.suffix not in (".gguf", ".bin") and hub.is_hub_id(spec):
        return _directory(spec, hub.snapshot(spec, hub.WEIGHTS + hub.TOKENIZER))
    near = difflib.get_close_matches(spec, PRESETS, n=3, cutoff=0.4)
    raise ValueError(
        f"model {spec!r}: not found. Tried a file or directory of that name (none), "
        f"a preset (nearest: {', '.join(near or list(PRESETS)[:3])}) and a hub id "
        "(expected OWNER/NAME)"
    )


def _directory(spec: str, path: pathlib.Path) -> Source:
    if (path / "model" / "architecture.json").exists():
        run = run_dir.read_architecture(path)
        return Source("run", spec, path, run.config, run.kind == "reward", run)
    if (path / "config.json").exists():
        reward = hf.has_reward_head(path)
        return Source("hf", spec, path, hf.read_config(path), reward)
    hint = ""
    if (path / "adapter_config.json").exists():
        hint = "; it holds a PEFT adapter: merge it into its model first"
    elif (path / "attributes.npz").exists():
        hint = f"; it holds a reward of attributes: attributes:{spec} scores with it"
    elif (path / "config.yaml").exists():
        hint = "; its run has not got as far as loading a model"
    raise ValueError(
        f"model {spec!r}: the directory is neither a run (model/architecture.json) nor "
        f"a Hugging Face model (config.json){hint}"
    )


def _file(spec: str, path: pathlib.Path) -> Source:
    if path.suffix == ".gguf":
        config = gguf.read_config(gguf.GGUF(path))
        return Source("gguf", spec, path, config, False)
    if path.suffix == ".bin":
        return Source("llama2c", spec, path, llama2c.read_config(path), False)
    raise ValueError(
        f"model {spec!r}: expected a .gguf or llama2.c .bin file, or the directory "
        "that holds config.json and the safetensors"
    )


def weights_identity(spec: str) -> str:
    """Names the weights of a SPEC by what it turned out to be and by the names, sizes
    and times of its files: other weights in the same place are another identity.

    Raises:
        ValueError: see `resolve`.
    """
    source = resolve(spec)
    path, files = source.path, []
    if path is not None and path.is_file():
        files = [path]
    elif path is not None and source.kind == "run":
        files = [path / "best.json", *(path / "checkpoints").rglob("*")]
    elif path is not None:
        files = list(path.iterdir())
    stats = [
        (str(file), file.stat().st_size, file.stat().st_mtime_ns)
        for file in sorted(files)
        if file.is_file()
    ]
    return repr((source, stats))


def load_policy(spec: str, **options: Any) -> Loaded:
    """A language model with parameters and tokenizer.

    Args:
        spec: see the module's docstring.
        **options: compute, lora, mesh, rules, key, tokenizer, step, as in `load`.

    Raises:
        ValueError: the source is a reward model, or cannot be read.
    """
    return load(spec, "causal", **options)


def load_reward_model(spec: str, **options: Any) -> Loaded:
    """A reward model; the head is N(0, 1/(D+1)) where the source has none.

    Args:
        spec: see the module's docstring.
        **options: compute, lora, mesh, rules, key, tokenizer, step, as in `load`.
    """
    return load(spec, "reward", **options)


def load(
    spec: str,
    kind: str,
    *,
    compute: ComputeConfig = ComputeConfig(),
    lora: LoraConfig = LoraConfig(),
    mesh: Mesh | None = None,
    rules: ShardingRules = ShardingRules(),
    key: jax.Array | None = None,
    tokenizer: str | None = None,
    step: int | None = None,
) -> Loaded:
    """Model, parameters and tokenizer of a SPEC.

    Args:
        spec: see the module's docstring.
        kind: causal or reward.
        compute: how it is computed; scan_layers decides the layout of the parameters.
        lora: fresh adapters to add.
        mesh: parameters are read or created sharded over it; None = one device.
        rules: how.
        key: of random weights, head and adapters; key(0) by default.
        tokenizer: SPEC of another tokenizer; presets get the testbed's by default.
        step: checkpoint of a run instead of the best one.
    """
    source = resolve(spec)
    if kind == "causal" and source.reward:
        raise ValueError(
            f"model {spec!r}: is a reward model; expected a language model"
        )
    key = jax.random.key(0) if key is None else key
    where = None if mesh is None else sharded.param_shardings(mesh, rules)
    bare = _MODULES[kind](source.config, compute, LoraConfig(), rules)
    params = _read(source, bare, where, key, step)
    model = bare.clone(lora=lora)
    if lora.rank:
        params = lora_lib.join_params(_adapters(model, where, key), params)
    return Loaded(model, params, _tokenizer(source, tokenizer))


def _kind(model: Any) -> str:
    return "causal" if isinstance(model, Llama) else "reward"


def _init(model: Any, key: jax.Array) -> Any:
    if isinstance(model, Llama):
        return init_llama(model, key)
    return heads.init_head_model(model, key)


def _create(make: Callable[[], Any], where: Where) -> Any:
    """What `make` returns, created with its shardings."""
    places = None if where is None else where(jax.eval_shape(make))
    return jax.jit(make, out_shardings=places)()


def _read(
    source: Source, model: Any, where: Where, key: jax.Array, step: int | None
) -> Any:
    """Parameters of a model without adapters, from its source."""
    if source.kind == "preset":
        return _create(functools.partial(_init, model, key), where)
    if source.kind == "run":
        params = _run(source, model, where, step)
    else:
        params = _foreign(source, model, where)
    if _kind(model) == "reward" and "head" not in params:
        params = {name: leaf for name, leaf in params.items() if name != "lm_head"}
        head = functools.partial(heads.init_head, source.config, key)
        fresh = _create(lambda: {"head": head()}, where)
        params = {"backbone": params, **fresh}
    if is_stacked(params) != model.compute.scan_layers:
        relayout = stacked if model.compute.scan_layers else unrolled
        params = _convert(relayout, params, where)
    return params


def _foreign(source: Source, model: Any, where: Where) -> Any:
    """Parameters of a file; without a head if it has none."""
    kind = _kind(model)
    shapes = jax.eval_shape(functools.partial(_init, model), jax.random.key(0))
    places = None if where is None else where(shapes)
    if kind == "reward" and not source.reward:
        kind, places = "backbone", places and places["backbone"]
    readers = {
        "hf": hf.load_hf,
        "gguf": gguf.load_gguf,
        "llama2c": llama2c.load_llama2c,
    }
    _, params = readers[source.kind](
        source.path,
        kind=kind,
        shardings=places,
        scan_layers=model.compute.scan_layers,
    )
    return params


def _run(source: Source, model: Any, where: Where, step: int | None) -> Any:
    """Parameters of a run's checkpoint, joined with its frozen leaves and merged."""
    run, path = source.run, source.path
    assert run is not None and path is not None
    params = checkpoint.load_params(path, step=step, shardings=where)
    params.pop("prototypes", None)  # of a contrastive term: no part of the model
    if run.base is not None:
        compute = dataclasses.replace(model.compute, scan_layers=run.scan_layers)
        bare = _MODULES[run.kind](run.config, compute, LoraConfig(), model.rules)
        key = jax.random.key(_seed(path))
        frozen = _read(_base(source), bare, where, key, None)
        params = lora_lib.join_params(params, frozen)
    if run.lora.rank:
        merge = functools.partial(lora_lib.merge_lora, lora=run.lora)
        params = _convert(merge, params, where)
    return params


def _base(source: Source) -> Source:
    """The model whose leaves a run left frozen."""
    assert source.run is not None and source.run.base is not None
    try:
        return resolve(source.run.base)
    except ValueError as error:
        raise ValueError(
            f"model {source.spec!r}: its checkpoints hold only what was trained; the "
            f"frozen leaves are those of its base: {error}"
        ) from None


def _convert(function: Callable[[Any], Any], params: Any, where: Where) -> Any:
    """function(params) on the mesh; the old parameters are given up."""
    places = None if where is None else where(jax.eval_shape(function, params))
    return jax.jit(function, out_shardings=places)(params)


def _seed(path: pathlib.Path) -> int:
    """The seed of a run, which its random base came from if that is a preset."""
    config = yaml.safe_load((path / "config.yaml").read_text())
    head = config.get("head_seed")
    return int(config.get("seed", 0) if head is None else head)


def _adapters(model: Any, where: Where, key: jax.Array) -> Any:
    """Fresh LoRA leaves alone: XLA drops the rest of the initialisation."""

    def make() -> Any:
        flat = traverse_util.flatten_dict(_init(model, key))
        return traverse_util.unflatten_dict(
            {p: leaf for p, leaf in flat.items() if p[-1] in ("lora_a", "lora_b")}
        )

    return _create(make, where)


def load_tokenizer_of(spec: str) -> Any:
    """The tokenizer of a model SPEC, without the model."""
    return _tokenizer(resolve(spec), None)


def _tokenizer(source: Source, spec: str | None) -> Any:
    """The tokenizer, which must fit the embedding table."""
    if spec is None and source.kind == "preset":
        from rlhf_jax.testbed.tokenizer import testbed_tokenizer

        tokenizer = testbed_tokenizer()
    elif spec is None and source.kind == "hf":
        assert source.path is not None
        tokenizer = tokenizers.from_directory(source.path)  # a hub id is local by now
    else:
        tokenizer = tokenizers.load_tokenizer(spec or source.spec)
    largest = max(tokenizer.get_vocab().values())
    if largest >= source.config.vocab_size:
        raise ValueError(
            f"model {source.spec!r}: vocab_size {source.config.vocab_size}, but the "
            f"tokenizer's largest id is {largest}; name another tokenizer or model"
        )
    return tokenizer
