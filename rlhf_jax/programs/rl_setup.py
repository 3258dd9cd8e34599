"""What `rloo` and `ppo` share around the loop: models, rewards, prompts, sizes.

`open_rl` makes a `Setting` from a config, and `train` hands it to `reinforce`. Where
adapters are trained, the reference policy is the same base with the adapters left out:
no second copy.
"""

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rlhf_jax import config as configs
from rlhf_jax.algorithms.policy import policy_apply
from rlhf_jax.data import prepare
from rlhf_jax.data.encode import Encoder
from rlhf_jax.data.groups import group_row_length
from rlhf_jax.data.plan import row_bucket
from rlhf_jax.data.store import PromptDataset
from rlhf_jax.io.metrics import metrics_writer
from rlhf_jax.models import lora
from rlhf_jax.models.config import LoraConfig
from rlhf_jax.models.llama import Llama
from rlhf_jax.programs import experience as xp
from rlhf_jax.programs import runs, sampler, sharded
from rlhf_jax.programs.models import load_policy
from rlhf_jax.programs.reinforcement import (
    Gather,
    Learn,
    Learner,
    RLCursor,
    Targets,
    reinforce,
)
from rlhf_jax.programs.rewards import open_rewards
from rlhf_jax.programs.rl_setting import Setting
from rlhf_jax.sharding import batch_devices
from rlhf_jax.types import Sequences, TrainState


@contextlib.contextmanager
def open_rl(config: Any) -> Iterator[Setting]:
    """The setting of a run, its directory locked and its mesh set.

    Args:
        config: of rloo or ppo.
    """
    sets = configs.parse_named(config.eval_data, "--eval_data")
    sampler.one_process()
    with runs.opened(config) as (run_dir, mesh):
        slices = batch_devices(mesh)
        if config.batch_size % slices:
            raise ValueError(
                f"batch_size {config.batch_size}: expected a multiple of the {slices} "
                "devices that share a batch (mesh.data x mesh.fsdp)"
            )
        model, params, tokenizer = load_policy(
            config.model,
            compute=config.compute,
            lora=config.lora,
            mesh=mesh,
            key=jax.random.key(config.seed),
        )
        encoder = prepare.make_encoder(tokenizer, config.rows)
        rows = dataclasses.replace(
            config.rows, max_prompt_length=sampler.prompt_limit(config, model)
        )
        data = runs.prepare_sets(
            prepare.prepare_prompts,
            dataclasses.replace(config, rows=rows),
            sets,
            encoder,
            run_dir,
        )
        trained, frozen = lora.split_params(
            params, "lora" if config.lora.rank else "all"
        )
        opened = functools.partial(
            open_rewards,
            scoring=config.scoring,
            timeout_s=config.shaping.timeout_s,
            encoder=encoder,
            row_length=_scored_length(config, data),
        )
        yield Setting(
            config=config,
            run_dir=run_dir,
            mesh=mesh,
            model=model,
            trained=trained,
            frozen=frozen,
            tokenizer=tokenizer,
            encoder=encoder,
            prompts=data.train,
            evals=data.evals,
            rewards=opened(config.reward),
            gold=None if config.gold is None else opened([config.gold]),
            packing=_packing(config, data, encoder, mesh),
            chunk=_chunk(config),
            generate=sampler.make_sampler(config, model, encoder),
            ref_logprobs=_reference(config, model, params, mesh),
            logprobs=_make_logprobs(config, model),
            put=sharded.make_put(mesh),
            put_micro=sharded.make_put(mesh, accum_steps=config.accum_steps),
        )


def train(
    config: Any,
    setting: Setting,
    *,
    learner: Learner,
    gather: Gather,
    targets: Targets,
    learn: Learn,
    schedule: Callable[[int], Any],
    kl_coef: float = 0.0,
) -> None:
    """Saves what the run is, runs the loop to its end and reports.

    Args:
        config: of rloo or ppo; its sizes, seed and loop are read.
        setting: see `open_rl`.
        learner: initial states.
        gather: see `reinforcement.Gather`.
        targets: see `reinforcement.Targets`.
        learn: see `reinforcement.reinforce`.
        schedule: optimizer step, from 0 -> learning rate of the policy.
        kl_coef: that the cursor begins with, where a controller moves it.
    """
    run_dir = setting.run_dir
    runs.save_architecture(
        run_dir,
        config,
        "causal",
        setting.model,
        setting.tokenizer,
        complete=not setting.frozen,
    )
    with metrics_writer(
        run_dir,
        resume_step=runs.latest_step(run_dir, config.epochs),
        wandb_project=config.loop.wandb_project,
        config=configs.to_dict(config),
    ) as write:
        reinforce(
            config.loop,
            run_dir=run_dir,
            learner=learner,
            cursor=RLCursor(kl_coef=kl_coef, data_digest=_digest(setting.prompts)),
            gather=gather,
            targets=targets,
            epoch_batches=lambda completions, rng: xp.minibatches(
                completions,
                setting.packing,
                count=config.minibatches,
                accum_steps=config.accum_steps,
                rng=rng,
            ),
            learn=learn,
            evaluate=setting.evaluate,
            steps=config.steps,
            epochs=config.epochs,
            seed=config.seed,
            write=write,
            learning_rate=lambda step: float(np.asarray(schedule(step - 1))),
            title=run_dir.name,
        )
    runs.finish(run_dir)


def check_rl(config: Any) -> None:
    """Refuses sizes that cannot be; shared by the configs of rloo and ppo."""
    for name in ("data", "reward"):
        if not getattr(config, name):
            raise ValueError(f"{name}: expected at least one --{name} SPEC")
    for name in ("batch_size", "steps", "epochs", "minibatches", "accum_steps"):
        if getattr(config, name) < 1:
            raise ValueError(
                f"{name}: expected at least 1, got {getattr(config, name)}"
            )
    if config.seed < 0:
        raise ValueError(f"seed: expected at least 0, got {config.seed}")
    if config.batch_size % (config.minibatches * config.accum_steps):
        raise ValueError(
            f"batch_size {config.batch_size}: expected a multiple of minibatches "
            f"{config.minibatches} x accum_steps {config.accum_steps}"
        )


def _packing(config: Any, data: runs.Data, encoder: Encoder, mesh: Mesh) -> xp.Packing:
    longest = int(data.train.lengths.max())
    length = config.rows.row_length or group_row_length(
        longest,
        config.sampling.max_new_tokens,
        config.sampling.num_samples,
    )
    needed = longest + config.sampling.max_new_tokens
    if length < needed:
        raise ValueError(
            f"rows.row_length {length}: the longest prompt of {longest} tokens and "
            f"sampling.max_new_tokens {config.sampling.max_new_tokens} need {needed}; "
            "set rows.row_length to at least that, or leave it out"
        )
    return xp.Packing(
        layout=config.rows.layout,
        row_length=length,
        rows_multiple_of=batch_devices(mesh),
        pad_id=encoder.pad_id,
    )


def _scored_length(config: Any, data: runs.Data) -> int:
    """A row that holds any prompt with its completion."""
    prompts = max(int(d.lengths.max()) for d in (data.train, *data.evals.values()))
    return row_bucket(prompts + config.sampling.max_new_tokens)


def _chunk(config: Any) -> int:
    """Completions of a micro-batch: what fits in a training step fits in a forward."""
    groups = config.batch_size // (config.minibatches * config.accum_steps)
    return groups * config.sampling.num_samples


def _reference(
    config: Any, model: Llama, params: Any, mesh: Mesh
) -> Callable[[TrainState, Sequences], jax.Array]:
    """(policy, rows) -> reference log-probabilities [B T]."""
    bare, ref_params = model.clone(lora=LoraConfig()), None
    if config.reference is not None:
        bare, ref_params, _ = load_policy(
            config.reference,
            compute=config.compute,
            mesh=mesh,
            key=jax.random.key(config.seed),
        )
        if bare.config.vocab_size != model.config.vocab_size:
            raise ValueError(
                f"reference {config.reference}: vocabulary of "
                f"{bare.config.vocab_size}, the policy has {model.config.vocab_size}; "
                "the two must share a tokenizer"
            )
    elif not config.lora.rank:
        # The policy's own leaves are given away at the first update.
        ref_params = jax.tree.map(lambda x: x.copy(), params)
    logprobs = _make_logprobs(config, bare)
    # Without parameters of its own it is the base of the policy's adapters, which
    # every update gives away and hands back: only the newest state holds them.
    return lambda policy, rows: logprobs(
        policy.frozen if ref_params is None else ref_params, rows
    )


def _make_logprobs(config: Any, model: Llama) -> Callable[[Any, Sequences], jax.Array]:
    """Jitted (params, rows) -> [B T], at the temperature of the sampling; greedy
    sampling has none, so 1."""
    apply = policy_apply(
        model, temperature=config.sampling.temperature or 1.0, deterministic=True
    )
    return jax.jit(lambda params, rows: apply(params, rows, jax.random.key(0))[0])


def _digest(dataset: PromptDataset) -> str:
    """What a resumed run must find again: the prompts' ids and their rows."""
    found = hashlib.sha256(dataset.tokens.tobytes())
    found.update(dataset.lengths.tobytes())
    found.update(dataset.rows.tobytes())
    return found.hexdigest()
