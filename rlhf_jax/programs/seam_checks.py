"""What a run of `seam` needs, checked in seconds, before a text is made or scored.

A misspelt reward, a missing key or package would otherwise come up when its turn does,
hours later. Only what is still to be done is checked: a finished run is summarised anew
without models, keys or packages.
"""

import importlib.util
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from rlhf_jax.io.chat import ChatClient
from rlhf_jax.io.run_dir import write_atomic
from rlhf_jax.programs import models
from rlhf_jax.programs.http_scorer import check_url
from rlhf_jax.programs.reward_functions import open_function
from rlhf_jax.programs.rewards import kind_of, parse_spec
from rlhf_jax.programs.scorer import ATTRIBUTES, ENSEMBLE, MADE_OF_MODELS
from rlhf_jax.sharding import make_mesh

WEIGHTS = "weights.json"
BEGUN_BY = ("worse-*.jsonl", "scores-*.jsonl")
"""Files of a run that has begun: before the first of them, settings may change."""
_SETTING = {
    "contrast": "contrast",
    "generate": "writer",
    "perturb": "perturb",
    "attack": "attack",
    "given": "worse_column",
}
"""Of each estimator."""


def may_change(root: pathlib.Path) -> tuple[str, ...]:
    """Settings of the estimators that have made no text in this directory so far."""
    made = {path.name for path in root.glob(BEGUN_BY[0]) if path.stat().st_size}
    return tuple(s for name, s in _SETTING.items() if f"worse-{name}.jsonl" not in made)


def check(config: Any, root: pathlib.Path, prompts: int) -> None:
    """That what is still to be done can be, as far as that is seen without loading.

    A new run writes down with which weights it began; one that goes on must not mix the
    scores of two models.

    Args:
        config: of the program.
        root: directory of the run.
        prompts: how many have a gold completion.

    Raises:
        ValueError: a model, a package, a key or a mesh is not there, or the files of
            the policy or the reward model have changed since.
    """
    unmade = _unfinished(root, "worse", config.estimators, prompts)
    _check_estimators(config, unmade)
    if unmade or _unfinished(root, "scores", config.estimators, prompts):
        _check_models(config)
        _check_weights(config, root)


def _unfinished(
    root: pathlib.Path, kind: str, names: Sequence[str], size: int
) -> list[str]:
    """The estimators whose file of this kind is not there in full."""
    paths = {name: root / f"{kind}-{name}.jsonl" for name in names}
    return [
        name
        for name, path in paths.items()
        if not path.exists() or path.read_bytes().count(b"\n") < size
    ]


def _check_estimators(config: Any, names: Sequence[str]) -> None:
    """That the packages, the writer and its key are there."""
    packages = []
    if "contrast" in names:
        packages.append(("faiss", "searches the neighbours"))
        if config.contrast.embedding is not None:
            packages.append(("sentence_transformers", "makes the embeddings"))
    for package, purpose in packages:
        if importlib.util.find_spec(package) is None:
            raise ValueError(
                f"estimator contrast: {package}, which {purpose}, is not installed; "
                'pip install "rlhf-jax[seam]"'
            )
    if "generate" in names:
        if config.writer.model is not None:
            models.resolve(config.writer.model)
        else:
            with ChatClient(config.writer.chat):
                pass  # package and key are there


def _check_models(config: Any) -> None:
    make_mesh(config.scoring.mesh)
    if models.resolve(config.policy).reward:
        raise ValueError(
            f"policy {config.policy}: is a reward model; expected a language model"
        )
    spec = parse_spec(config.reward)[1]
    kind = kind_of(spec)
    if kind == "function":
        open_function(spec, config.timeout_s)
    elif kind == "http":
        check_url(spec)
    elif spec.startswith(MADE_OF_MODELS):
        prefix = ENSEMBLE if spec.startswith(ENSEMBLE) else ATTRIBUTES
        folder = spec.removeprefix(prefix).partition("?")[0]
        if not pathlib.Path(folder).expanduser().is_dir():
            raise ValueError(
                f"reward {spec}: expected a directory after {prefix}, such as a run of "
                f"strength or of attributes; {folder} is none"
            )
    elif not (models.resolve(spec).reward or config.scoring.untrained_head):
        raise ValueError(
            f"reward {spec}: it has no reward head, so its scores would be random; "
            "train one with `rlhf-jax reward`"
        )


def _check_weights(config: Any, root: pathlib.Path) -> None:
    found = {"policy": models.weights_identity(config.policy)}
    spec = parse_spec(config.reward)[1]
    if kind_of(spec) == "model" and not spec.startswith(MADE_OF_MODELS):
        found["reward"] = models.weights_identity(spec)
    path = root / WEIGHTS
    if not path.exists():
        write_atomic(path, json.dumps(found, indent=1))
    for name, before in json.loads(path.read_text(encoding="utf-8")).items():
        if found[name] != before:
            raise ValueError(
                f"run_dir {root}: begun with other weights of the {name} "
                f"{getattr(config, name)}, which has changed since; choose another "
                "--run_dir"
            )
