"""The members of a strength run: trained, scored, averaged; what `strength` builds on.

members.json          whether members are trained together (at_once: null), and why
members/M/            a run of `reward`, or an exported model (at_once)
members/M/rewards.npz its rewards for the pairs that it may judge, and their digest
folds/without-F.jsonl what the members of fold F are trained on
"""

import dataclasses
import functools
import hashlib
import json
import math
import pathlib
import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from rlhf_jax.algorithms.optimizer import make_optimizer, make_schedule
from rlhf_jax.algorithms.reward_model import reward_apply, reward_objective
from rlhf_jax.data import prepare
from rlhf_jax.data.encode import Encoder
from rlhf_jax.data.iterate import Batches
from rlhf_jax.data.rows import pair_row
from rlhf_jax.data.store import PairDataset
from rlhf_jax.evals.suite import prompt_key
from rlhf_jax.io import progress
from rlhf_jax.io.run_dir import write_atomic
from rlhf_jax.models.heads import RewardModel, init_head_model
from rlhf_jax.programs import (
    export,
    members,
    members_memory,
    models,
    objectives,
    reward,
)
from rlhf_jax.programs.scored_rows import write_whole
from rlhf_jax.programs.scorer import ScoringConfig, open_scorer
from rlhf_jax.programs.supervised import LoopConfig
from rlhf_jax.sharding import MeshConfig

if TYPE_CHECKING:
    from rlhf_jax.programs.strength import StrengthConfig

REWARDS = "rewards.npz"
WAYS = {True: "at once", False: "one by one"}


def folds(rows: Sequence[dict[str, Any]], config: "StrengthConfig") -> np.ndarray:
    """The fold of each row; rows of one prompt share theirs.

    Raises:
        ValueError: fewer prompts than folds.
    """
    columns = config.rows.columns
    keys = [prompt_key(pair_row(row, columns).prompt) for row in rows]
    number = {key: n for n, key in enumerate(dict.fromkeys(keys))}
    if len(number) < config.folds:
        raise ValueError(
            f"folds: the pairs have {len(number)} prompts; expected at least as many "
            f"as folds, {config.folds}"
        )
    return np.array([number[key] % max(config.folds, 1) for key in keys])


def alone_for(config: "StrengthConfig") -> str:
    """The settings that members trained together cannot have, with commas."""
    given = {
        "lora.rank": config.lora.rank > 0,
        "accum_steps": config.accum_steps > 1,
        "mesh": config.mesh != MeshConfig(),
        "rows.layout": config.rows.layout != "shared",
        "rows.row_length": config.rows.row_length is not None,
    }
    return ", ".join(name for name, is_given in given.items() if is_given)


def at_once(config: "StrengthConfig", root: pathlib.Path, dataset: PairDataset) -> bool:
    """Whether the members are trained together: as the config says, or as the memory
    allowed when the run began."""
    if config.at_once is not None:
        return config.at_once
    path = root / "members.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))["at_once"]
    decision = members_memory.decide(
        members=config.members,
        member_bytes=_member_bytes(config, dataset),
        free_bytes=members_memory.free_bytes(jax.local_devices()[0]),
        devices=jax.device_count(),
        alone=alone_for(config),
    )
    write_atomic(path, json.dumps({"schema": 1, **decision._asdict()}, indent=1))
    progress.say(f"members {WAYS[decision.at_once]}: {decision.why}")
    return decision.at_once


def _member_bytes(config: "StrengthConfig", dataset: PairDataset) -> int:
    compute = dataclasses.replace(config.compute, remat="none")
    model = RewardModel(models.resolve(config.model).config, compute)
    params = jax.eval_shape(
        functools.partial(init_head_model, model), jax.random.key(0)
    )
    objective, tx, _ = _training(config, model, dataset)
    batches = Batches(
        dataset, config.batch_size, seed=config.seed + 1, num_shapes=1, prefetch=0
    )
    return members_memory.member_bytes(objective, tx, params, next(batches)[0])


def rewards(
    config: "StrengthConfig",
    root: pathlib.Path,
    rows: Sequence[dict[str, Any]],
    dataset: PairDataset,
    fold: np.ndarray,
    encoder: Encoder,
) -> tuple[np.ndarray, np.ndarray]:
    """Rewards [Q M] of chosen and rejected, each row by members allowed to judge it."""
    rewards = np.zeros((len(rows), 2, config.members), np.float32)
    encoded = list(members.completions(dataset))
    digest = hashlib.sha256(dataset.tokens.tobytes()).hexdigest()
    together = at_once(config, root, dataset)
    for part in range(max(config.folds, 1)):
        judged = np.flatnonzero(fold == part)
        spec = config.data
        if config.folds:
            path = root / "folds" / f"without-{part}.jsonl"
            path.parent.mkdir(exist_ok=True)
            write_whole(path, (rows[n] for n in np.flatnonzero(fold != part).tolist()))
            spec = str(path)
        names = [
            f"{part}-{m}" if config.folds else f"{m}" for m in range(config.members)
        ]
        folders = [root / "members" / name for name in names]
        missing = [f for f in folders if not (f / REWARDS).exists()]
        if together and missing:
            _train_together(config, folders, spec, encoder)
        for member, folder in enumerate(folders):
            kept = folder / REWARDS
            if not kept.exists():
                progress.say(f"member {folder.name}")
                if not together:
                    reward.run(_member(config, folder, spec, member))
                scoring = ScoringConfig(
                    template=config.rows.template,
                    max_length=config.rows.max_length,
                    compute=config.compute,
                    mesh=config.mesh,
                )
                texts = [
                    encoded[2 * n + side] for n in judged.tolist() for side in (0, 1)
                ]
                _save_rewards(
                    kept, open_scorer(str(folder), scoring).rewards(texts), digest
                )
            rewards[judged, :, member] = _load_rewards(kept, digest)
    return rewards[:, 0], rewards[:, 1]


def _save_rewards(path: pathlib.Path, rewards: np.ndarray, digest: str) -> None:
    """A whole file or none, with what was scored."""
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, rewards=rewards, digest=np.array(digest))
    partial.replace(path)


def _load_rewards(path: pathlib.Path, digest: str) -> np.ndarray:
    """[Q 2] of chosen and rejected.

    Raises:
        ValueError: other pairs were scored.
    """
    with np.load(path) as kept:
        if str(kept["digest"]) != digest:
            raise ValueError(
                f"{path}: the members were trained on other pairs than --data holds "
                "now; restore the data, or choose another --run_dir"
            )
        return kept["rewards"].reshape(-1, 2)


def _train_together(
    config: "StrengthConfig",
    folders: Sequence[pathlib.Path],
    spec: str,
    encoder: Encoder,
) -> None:
    """All members of a fold by `members.make_trainer`, exported to their folders."""
    loaded = models.load_reward_model(
        config.model, compute=config.compute, key=jax.random.key(config.seed)
    )
    dataset, _ = prepare.prepare_pairs([spec], encoder, config.rows)
    objective, tx, steps = _training(config, loaded.model, dataset)
    progress.say(
        f"{len(folders)} members at once: {steps} steps of {config.batch_size}"
    )
    trained = members.make_trainer(objective, tx, at_once=True)(
        [loaded.params] * len(folders),
        [dataset] * len(folders),
        seeds=[config.seed + 1 + m for m in range(len(folders))],
        steps=steps,
        batch_size=config.batch_size,
    )
    for folder, params in zip(folders, trained, strict=True):
        shutil.rmtree(folder, ignore_errors=True)
        _export(folder, config, dataclasses.replace(loaded, params=params), encoder)


def _training(
    config: "StrengthConfig", model: RewardModel, dataset: PairDataset
) -> tuple[Any, Any, int]:
    """(objective, optimizer, steps) of each of the members together."""
    steps = config.steps or math.ceil(config.epochs * len(dataset) / config.batch_size)
    tx = make_optimizer(config.optimizer, make_schedule(config.optimizer, steps))
    objective = reward_objective(
        reward_apply(model, deterministic=not config.compute.dropout),
        **objectives.parts(config.loss, ()),
    )
    return objective, tx, steps


def _member(
    config: "StrengthConfig", folder: pathlib.Path, spec: str, member: int
) -> reward.RewardConfig:
    return reward.RewardConfig(
        run_dir=str(folder),
        model=config.model,
        data=[spec],
        loss=config.loss,
        batch_size=config.batch_size,
        accum_steps=config.accum_steps,
        epochs=config.epochs,
        steps=config.steps,
        seed=config.seed + 1 + member,
        head_seed=config.seed,
        rows=config.rows,
        optimizer=config.optimizer,
        loop=LoopConfig(keep=1),
        compute=config.compute,
        lora=config.lora,
        mesh=config.mesh,
    )


def write_average(
    config: "StrengthConfig", root: pathlib.Path, encoder: Encoder
) -> None:
    """warm/: the members' mean parameters as one model (WARM, arXiv:2401.12187)."""
    out = root / "warm"
    if out.exists():
        return
    progress.say("average of the members")
    folders = [root / "members" / str(m) for m in range(config.members)]
    loaded = models.load_reward_model(str(folders[0]))
    total = loaded.params
    for folder in folders[1:]:
        other = models.load_reward_model(str(folder)).params
        total = jax.tree.map(lambda a, b: a + b, total, other)
    mean = jax.tree.map(lambda leaf: leaf / config.members, total)
    _export(out, config, dataclasses.replace(loaded, params=mean), encoder)


def _export(
    out: pathlib.Path, config: "StrengthConfig", loaded: models.Loaded, encoder: Encoder
) -> None:
    export.write(
        str(out),
        loaded,
        kind="reward",
        encoder=encoder,
        dtype="float32",
        max_shard_bytes=int(5e9),
        source=models.resolve(config.model),
    )
