"""What `score` and `evaluate` share: a loaded reward model as a function of texts.

`open_scorer` loads model, tokenizer and template and jits one function;
`Scorer.encode_all` reads texts through the one encode path, `Scorer.rewards` goes from
there to rewards and `Scorer.rewards_and_states` to rewards and hidden states.
A text that cannot be scored (too long, empty, refused by the template) is a `Refusal`
with its reason, not an exception and never a cut text.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from rlhf_jax.curation import ensemble
from rlhf_jax.data.encode import Encoder
from rlhf_jax.data.encoded import EncodedCompletion
from rlhf_jax.data.texts import Texts
from rlhf_jax.evals import scoring
from rlhf_jax.losses import statistics
from rlhf_jax.models.config import ComputeConfig, LlamaConfig
from rlhf_jax.programs import attribute_model, models
from rlhf_jax.sharding import (
    MeshConfig,
    ShardingRules,
    batch_devices,
    batch_sharding,
    make_mesh,
    replicated,
)

ENSEMBLE, ATTRIBUTES = "ensemble:", "attributes:"
MADE_OF_MODELS = (ENSEMBLE, ATTRIBUTES)
"""What the SPECs of scorers begin with that are no single model with a scalar head."""


@dataclasses.dataclass(frozen=True)
class ScoringConfig:
    """How texts become rewards."""

    template: str = "tokenizer"
    """Chat template: tokenizer (its own; plain if it has none), plain, or a jinja
    file."""
    max_length: int = 0
    """Most tokens of prompt and completion; longer rows are set aside. 0 = what the
    model was made for."""
    tokens_per_batch: int = 8192
    """Cells of a batch: the memory it takes. Scores do not depend on it."""
    untrained_head: bool = False
    """Accept a model without a reward head, with a random one (its scores mean
    nothing)."""
    compute: ComputeConfig = ComputeConfig()
    """dtype, attention backend, rematerialisation."""
    mesh: MeshConfig = MeshConfig()
    """Devices: data x fsdp x tensor."""

    def __post_init__(self) -> None:
        if self.max_length < 0:
            raise ValueError(
                f"max_length {self.max_length}: expected tokens, or 0 for the model's "
                f"own"
            )
        if self.tokens_per_batch < 1:
            raise ValueError(
                f"tokens_per_batch {self.tokens_per_batch}: expected at least 1"
            )


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why a text has no reward."""

    reason: str
    """Short, the same for all texts of a kind: for counting."""
    detail: str = ""
    """This text's own numbers."""


@dataclasses.dataclass(frozen=True, eq=False)
class Scorer:
    """A reward model that reads text."""

    encoder: Encoder
    score_fn: scoring.ScoreFn
    max_length: int
    tokens_per_batch: int
    rows_multiple_of: int
    mesh: jax.sharding.Mesh
    share: bool = True
    """Compute a prompt once for all its completions in a row."""
    random_head: bool = False
    """Whether the scores mean nothing: the source had no head."""
    states_fn: scoring.StatesFn | None = None
    """Rewards and states of a reward model that is at hand; None = rewards alone."""
    head_norm: float | None = None
    """|W| of its head."""

    def encode(
        self, prompt: Any, text: str, *, tools: list | None = None
    ) -> EncodedCompletion | Refusal:
        """Token ids, or why there are none."""
        return self.encode_all(Texts([prompt], [text], [{"tools": tools}]))[0]

    def encode_all(self, texts: Texts) -> list[EncodedCompletion | Refusal]:
        """Token ids of each text, or why it has none: much faster than one by one."""
        return [self._fitting(found) for found in texts.encoded(self.encoder)]

    def _fitting(
        self, found: EncodedCompletion | ValueError
    ) -> EncodedCompletion | Refusal:
        if isinstance(found, ValueError):
            return Refusal("cannot be encoded", str(found))
        tokens = len(found.prompt) + len(found.completion)
        if tokens > self.max_length:
            return Refusal(
                f"longer than max_length {self.max_length}", f"{tokens} tokens"
            )
        return found

    def rewards(
        self,
        encoded: Sequence[EncodedCompletion],
        progress: Callable[[int], None] | None = None,
        *,
        row_length: int | None = None,
    ) -> np.ndarray:
        """float32 rewards in input order; see `scoring.score`."""
        with jax.set_mesh(self.mesh):
            return scoring.score(
                self.score_fn,
                encoded,
                tokens_per_batch=self.tokens_per_batch,
                rows_multiple_of=self.rows_multiple_of,
                share=self.share,
                progress=progress,
                row_length=row_length,
            )

    def rewards_and_states(
        self,
        encoded: Sequence[EncodedCompletion],
        keep: np.ndarray,
        progress: Callable[[int], None] | None = None,
    ) -> scoring.ScoredStates:
        """Rewards, and states of the completions `keep`; `scoring.score_with_states`.

        Raises:
            ValueError: see `check_states`.
        """
        self.check_states()
        assert self.states_fn is not None
        with jax.set_mesh(self.mesh):
            return scoring.score_with_states(
                self.states_fn,
                encoded,
                keep,
                tokens_per_batch=self.tokens_per_batch,
                rows_multiple_of=self.rows_multiple_of,
                share=self.share,
                progress=progress,
            )

    def check_states(self) -> None:
        """Refuses to give states where there is no model to read them from.

        Raises:
            ValueError: the scorer gives rewards alone.
        """
        if self.states_fn is None:
            raise ValueError(
                "states: this scorer gives rewards alone; expected a reward model of "
                "this package (a run directory, a Hugging Face directory or a hub "
                "id), whose states can be read; leave the states out"
            )


def open_scorer(spec: str, config: ScoringConfig, *, seed: int = 0) -> Scorer:
    """The reward model of `--model SPEC`, ready to score.

    Args:
        spec: as in `models`; or ensemble:DIR[?combine=mean|min|mean-std], all reward
            models in DIR/members (a run of `strength`), or in DIR, as one; or
            attributes:DIR, what `attributes` wrote there on the states of its model.
        config: how.
        seed: of a random head.

    Raises:
        ValueError: no such model, or one without a reward head (unless
            `untrained_head`).
    """
    if spec.startswith(ENSEMBLE):
        return _open_ensemble(spec, config)
    if spec.startswith(ATTRIBUTES):
        return _open_attributes(spec, config)
    source = models.resolve(spec)
    if not source.reward and not config.untrained_head:
        raise ValueError(
            f"model {spec}: it has no reward head, so its scores would be random; "
            "train one with `rlhf-jax reward`, or set scoring.untrained_head to look "
            "at it anyway"
        )
    mesh, rules = make_mesh(config.mesh), ShardingRules()
    model, params, tokenizer = _load(spec, config, mesh, rules, seed)
    with jax.set_mesh(mesh):
        apply = {
            method: jax.jit(functools.partial(_apply, model, method))
            for method in ("__call__", "rewards_and_states")
        }
        norm = float(jax.jit(statistics.head_norm)(params["head"]["kernel"]))
    where = batch_sharding(mesh, rules)

    def call(method: str, sequences: Any, score_at: Any) -> Any:
        sequences, score_at = jax.device_put((sequences, score_at), where)
        return apply[method](params, sequences, score_at)

    return make_scorer(
        functools.partial(call, "__call__"),
        tokenizer,
        model.config,
        config,
        random_head=not source.reward,
        states_fn=functools.partial(call, "rewards_and_states"),
        head_norm=norm,
    )


def _load(
    spec: str, config: ScoringConfig, mesh: Any, rules: ShardingRules, seed: int
) -> models.Loaded:
    with jax.set_mesh(mesh):
        return models.load_reward_model(
            spec,
            compute=config.compute,
            mesh=mesh,
            rules=rules,
            key=jax.random.key(seed),
        )


def make_scorer(
    score_fn: scoring.ScoreFn,
    tokenizer: Any,
    architecture: LlamaConfig,
    config: ScoringConfig,
    **fields: Any,
) -> Scorer:
    """The Scorer of a function on batches.

    Args:
        score_fn: what it is made of.
        tokenizer: of the model.
        architecture: of the model, for its longest sequence.
        config: how texts become batches.
        **fields: others of Scorer.
    """
    mesh, rules = make_mesh(config.mesh), ShardingRules()
    return Scorer(
        encoder=Encoder(tokenizer, template=config.template),
        score_fn=score_fn,
        max_length=config.max_length or architecture.max_position_embeddings,
        tokens_per_batch=config.tokens_per_batch,
        rows_multiple_of=batch_devices(mesh, rules),
        mesh=mesh,
        share=scoring.can_share(config.compute.attention),
        **fields,
    )


def _open_ensemble(spec: str, config: ScoringConfig) -> Scorer:
    """Every member scores each batch; `curation.ensemble` makes theirs one reward."""
    place, _, query = spec.removeprefix(ENSEMBLE).partition("?")
    name, _, how = query.partition("=")
    if query and name != "combine":
        raise ValueError(f"{spec}: unknown option {name!r}; expected combine=...")
    how = how or "mean"
    if how not in ensemble.COMBINE:
        raise ValueError(
            f"{spec}: combine: expected one of {', '.join(ensemble.COMBINE)}, got "
            f"{how!r}"
        )
    root = pathlib.Path(place).expanduser()
    folder = root / "members" if (root / "members").is_dir() else root
    paths = sorted(path for path in folder.glob("*") if path.is_dir())
    if len(paths) < 2:
        raise ValueError(
            f"{spec}: {len(paths)} models in {folder}; expected two or more, such as "
            "the members of a strength run"
        )
    scorers = [open_scorer(str(path), config) for path in paths]

    def score_fn(sequences: Any, score_at: Any) -> np.ndarray:
        found = [np.asarray(s.score_fn(sequences, score_at)) for s in scorers]
        rewards = np.stack(found, axis=-1)
        combined = ensemble.COMBINE[how](rewards.reshape(-1, len(scorers)))
        return combined.reshape(rewards.shape[:-1])

    return dataclasses.replace(
        scorers[0], score_fn=score_fn, states_fn=None, head_norm=None
    )


def _open_attributes(spec: str, config: ScoringConfig) -> Scorer:
    """Regressions and gate of an `attributes` run, on the states of its model."""
    folder = spec.removeprefix(ATTRIBUTES)
    head, card = attribute_model.load(folder), attribute_model.load_card(folder)
    template = card["config"]["scoring"]["template"]
    if config.template != template:
        raise ValueError(
            f"{spec}: fitted on states of the template {template}, got "
            f"{config.template}; set scoring.template to {template}"
        )
    mesh, rules = make_mesh(config.mesh), ShardingRules()
    try:
        loaded = _load(card["model"], config, mesh, rules, card["config"]["seed"])
    except ValueError as error:
        raise ValueError(f"{spec}: the model that it reads: {error}") from None
    fitted, width = head.weights.shape[1], loaded.model.config.hidden_size
    if fitted != width:
        raise ValueError(
            f"{spec}: fitted on states of width {fitted}, and model {card['model']} "
            f"has {width}: it is another model now; run `attributes` again"
        )
    apply = jax.jit(attribute_model.reward_apply(loaded.model, head))
    arrays = jax.device_put(attribute_model.head_params(head), replicated(mesh))
    where = batch_sharding(mesh, rules)

    def score_fn(sequences: Any, score_at: Any) -> Any:
        sequences, score_at = jax.device_put((sequences, score_at), where)
        return apply(loaded.params, arrays, sequences, score_at)

    return make_scorer(score_fn, loaded.tokenizer, loaded.model.config, config)


def _apply(model: Any, method: str, params: Any, sequences: Any, score_at: Any) -> Any:
    return model.apply({"params": params}, sequences, score_at, method=method)
