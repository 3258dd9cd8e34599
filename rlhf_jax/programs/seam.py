"""`rlhf-jax seam`: how well a policy and a reward model fit together, prompt by prompt.

Read `run`: prompts with gold completions are read; for each estimator worse completions
are made (`worse`), scored by policy and reward model in parts (`seam_scoring`), and
combined (`curation.seam.scores`). Into run_dir go seam.jsonl (a line a prompt and
estimator), prompts.jsonl, set_aside.jsonl, seam.json, plots and report.html. What is
made or scored is kept: a stopped run goes on where it was, a finished one is summarised
anew in seconds.

Source: arXiv:2406.07971; the formula is a reconstruction, see `curation.seam.scores`.
"""

import dataclasses
import functools
import importlib.util
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console

from rlhf_jax import config as configs
from rlhf_jax.curation.seam.scores import SeamFormula
from rlhf_jax.data.rows import Columns
from rlhf_jax.io import progress, seam_report
from rlhf_jax.io.run_dir import open_run, write_atomic
from rlhf_jax.programs import scored_rows, seam_checks, seam_scoring, worse, writer
from rlhf_jax.programs.adversary import AttackConfig
from rlhf_jax.programs.likelihood import open_likelihood
from rlhf_jax.programs.rewards import kind_of, open_rewards, parse_spec
from rlhf_jax.programs.scorer import MADE_OF_MODELS, ScoringConfig
from rlhf_jax.programs.seam_prompts import SeamPrompt, Worse, read_prompts
from rlhf_jax.programs.seam_scoring import Line
from rlhf_jax.programs.worse import ContrastConfig, Estimator, PerturbConfig
from rlhf_jax.programs.writer import WriterConfig

PART = 64
"""Prompts scored and written together."""
_SPEED = ("texts_scored", "texts_per_s")
_ASKING = ("per_minute", "concurrent", "retries", "timeout_s", "key_variable")
MAY_CHANGE = (
    *("formula", "min_worse", "parquet", "compare", "estimators", "timeout_s"),
    "scoring.tokens_per_batch",
    *("writer.max_failed", "writer.chat.max_price", "writer.chat.price_in"),
    *("writer.chat.price_out", *(f"writer.chat.{name}" for name in _ASKING)),
)
"""Settings of a run that goes on: none of them changes a text or a score."""
PROMPTS = "prompts.jsonl"


@dataclasses.dataclass(frozen=True)
class SeamConfig:
    """The seamlessness of a policy and a reward model on RL prompts."""

    run_dir: str
    """Directory of the results; one that holds this very run is resumed."""
    policy: str
    """Policy: run directory, HF directory, hub id or .gguf."""
    reward: str
    """Reward model; or package.module:function, http://..., ensemble:DIR."""
    data: list[str]
    """Prompts with gold completions, SPEC; repeat for several."""
    estimators: list[Estimator] = dataclasses.field(
        default_factory=lambda: ["contrast"]
    )
    """Where worse completions come from, one or more of contrast, generate, perturb,
    attack, given; each gets its own scores."""
    gold_column: str = "gold_completion"
    """Column of the gold completion; `chosen` for pairs."""
    worse_column: str = "worse"
    """Column of the worse completions, for the estimator given."""
    formula: SeamFormula = SeamFormula()
    """How likelihood and misjudgement become a score."""
    contrast: ContrastConfig = ContrastConfig()
    """Of the estimator contrast."""
    writer: WriterConfig = WriterConfig()
    """Of the estimator generate."""
    perturb: PerturbConfig = PerturbConfig()
    """Of the estimator perturb."""
    attack: AttackConfig = AttackConfig()
    """Of the estimator attack."""
    min_worse: int = 1
    """Fewest worse completions of a prompt that gets a score: a mean over few is
    noisy, and noise fills both ends of the ranks."""
    parquet: bool = False
    """Write seam.parquet beside seam.jsonl."""
    compare: list[str] = dataclasses.field(default_factory=list)
    """seam.jsonl of another policy or reward model on the same prompts, as NAME=PATH:
    adds the overlap of the lowest fifths; repeat for several."""
    seed: int = 0
    """Of the perturbations and of a local writer."""
    timeout_s: float = 60.0
    """Longest call of a reward that is a function or HTTP."""
    columns: Columns = Columns()
    """Names of the columns of data."""
    scoring: ScoringConfig = ScoringConfig()
    """How both models read texts."""

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("data: expected at least one --data SPEC")
        if not self.estimators or len(set(self.estimators)) < len(self.estimators):
            raise ValueError(
                f"estimators: expected one or more, each once, got {self.estimators}"
            )
        writes = self.writer.model is not None or self.writer.chat.base_url is not None
        if ("generate" in self.estimators) != writes:
            raise ValueError(
                "estimators: generate needs a writer, writer.model or "
                "writer.chat.base_url with writer.chat.model, and a writer needs it"
            )
        if self.min_worse < 1:
            raise ValueError(f"min_worse: expected at least 1, got {self.min_worse}")
        if self.parquet and importlib.util.find_spec("pyarrow") is None:
            raise ValueError(
                'parquet: pyarrow is not installed; pip install "rlhf-jax[data]"'
            )
        weight, spec = parse_spec(self.reward)
        one_model = kind_of(spec) == "model" and not spec.startswith(MADE_OF_MODELS)
        if "attack" in self.estimators and not (one_model and weight > 0):
            raise ValueError(
                "estimators: attack follows the gradient of one reward model, and "
                f"reward {self.reward} is none with a weight above 0; name a model, or "
                "leave attack out"
            )


def run(config: SeamConfig) -> pathlib.Path:
    """Makes and scores what is not there yet, writes, prints; returns run_dir."""
    opened = open_run(
        config.run_dir,
        config,
        begun_by=seam_checks.BEGUN_BY,
        may_change=MAY_CHANGE
        + seam_checks.may_change(pathlib.Path(config.run_dir).expanduser()),
    )
    with opened.lock:
        root = opened.path
        prompts, rows, left_out = read_prompts(
            config.data, config.columns, config.gold_column
        )
        others = _others(config)
        if not opened.resumed:  # what an attempt left that made no text
            for name in (PROMPTS, seam_checks.WEIGHTS):
                (root / name).unlink(missing_ok=True)
        seam_checks.check(config, root, len(prompts))
        _write_prompts(root, rows)
        made = {name: _worse(config, root, name, prompts) for name in config.estimators}
        scored, speed = _score(config, root, prompts, made)
        which = {prompt.index: prompt.occurrence for prompt in prompts}
        lines = {
            name: [
                {**line, "occurrence": which[line["index"]]}
                for line in seam_scoring.with_scores(
                    found, config.formula, config.min_worse
                )
            ]
            for name, found in scored.items()
        }
        for found in scored.values():
            left_out += seam_scoring.without_score(prompts, found, config.min_worse)
        every = [line for found in lines.values() for line in found]
        scored_rows.write_whole(root / "seam.jsonl", every)
        if config.parquet:
            _write_parquet(root / "seam.parquet", every)
        scored_rows.write_whole(root / "set_aside.jsonl", left_out)
        summary = seam_report.summarise(lines, others)
        summary |= {"prompts": len(prompts), "set_aside": len(left_out), **speed}
        write_atomic(root / "seam.json", json.dumps(summary, indent=1))
        report = seam_report.write(root, summary, lines)
    seam_report.show(summary, Console())
    Console(highlight=False).print(
        f"{root / 'seam.jsonl'}\n{root / 'set_aside.jsonl'}\nreport: {report}\n"
        f"next  rlhf-jax seam-select --run_dir {root} --out ...",
        markup=False,
        soft_wrap=True,
    )
    return root


def _write_parquet(path: pathlib.Path, lines: Sequence[Line]) -> None:
    """The lines as a table; a prompt of messages is written as JSON."""
    import pyarrow
    import pyarrow.parquet

    def text(value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value)

    rows = [{**line, "prompt": text(line["prompt"])} for line in lines]
    for row in rows:
        row["tools"] = text(row["tools"]) if row.get("tools") else None
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def _write_prompts(root: pathlib.Path, rows: Sequence[Line]) -> None:
    """prompts.jsonl: the rows with a prompt, in their order, for `seam-select`.

    Raises:
        ValueError: the directory holds scores of other prompts.
    """
    path = root / PROMPTS
    text = "".join(map(scored_rows.dump, rows))
    if not path.exists():
        write_atomic(path, text)
    elif path.read_text(encoding="utf-8") != text:
        raise ValueError(
            f"run_dir {root}: holds scores of other prompts; data has changed since; "
            "choose another --run_dir"
        )


def _worse(
    config: SeamConfig, root: pathlib.Path, name: Estimator, prompts: list[SeamPrompt]
) -> Worse:
    """The worse completions of an estimator, made once; models make them in parts."""
    path, size = root / f"worse-{name}.jsonl", len(prompts)
    if name == "attack":
        spec = parse_spec(config.reward)[1]
        make = functools.partial(
            worse.by_attack, prompts, config.attack, spec, config.scoring
        )
        return _in_parts(path, size, worse.PART, make)
    if name == "generate" and config.writer.model is not None:
        make = functools.partial(
            writer.by_policy, prompts, config.writer, config.scoring, config.seed
        )
        return _in_parts(path, size, config.writer.part, make)
    if not path.exists():
        if name == "contrast":
            made = worse.by_contrast(
                prompts, config.contrast, config.policy, config.scoring
            )
        elif name == "generate":
            made = writer.by_endpoint(prompts, config.writer)
        elif name == "perturb":
            made = worse.by_perturbation(prompts, config.perturb, config.seed)
        else:
            made = worse.given(prompts, config.worse_column)
        scored_rows.write_whole(path, ({"worse": each} for each in made))
    return [line["worse"] for line in scored_rows.read_jsonl(path)]


def _in_parts(
    path: pathlib.Path, total: int, size: int, make: Callable[..., Iterator[Worse]]
) -> Worse:
    """The lines of a file that grows part by part: those that are there, and the rest.

    Args:
        path: of the file.
        total: prompts.
        size: of a part.
        make: start -> the parts from that prompt on.
    """
    lines = seam_scoring.read_parts(path, total, size)
    if len(lines) < total:
        with path.open("a", encoding="utf-8") as file:
            for part in make(start=len(lines)):
                new = [{"worse": each} for each in part]
                file.write("".join(map(scored_rows.dump, new)))
                file.flush()
                lines += new
    return [line["worse"] for line in lines]


def _score(
    config: SeamConfig,
    root: pathlib.Path,
    prompts: list[SeamPrompt],
    made: Mapping[str, Worse],
) -> tuple[dict[str, list[Line]], dict[str, float]]:
    """Log-probabilities and rewards of every text, part by part; what is on disk is
    read. Also how long the new ones took."""
    found = {
        name: seam_scoring.read_parts(root / f"scores-{name}.jsonl", len(prompts), PART)
        for name in made
    }
    if all(len(lines) == len(prompts) for lines in found.values()):
        return found, _earlier_speed(root)
    likelihood = open_likelihood(config.policy, config.scoring)
    rewards = open_rewards(
        [config.reward], scoring=config.scoring, timeout_s=config.timeout_s
    )
    texts, start = 0, time.perf_counter()
    for name, completions in made.items():
        lines = found[name]
        with (
            progress.counting_bar(f"scoring {name}", len(prompts)) as advance,
            (root / f"scores-{name}.jsonl").open("a", encoding="utf-8") as file,
        ):
            advance(len(lines))
            for first in range(len(lines), len(prompts), PART):
                some = slice(first, first + PART)
                part = seam_scoring.score_part(
                    name, prompts[some], completions[some], likelihood, rewards
                )
                lines += part
                file.write("".join(scored_rows.dump(line) for line in part))
                file.flush()
                texts += sum(len(line["worse"]) + 1 for line in part)
                advance(len(part))
    seconds = time.perf_counter() - start
    return found, dict(zip(_SPEED, (texts, texts / seconds), strict=True))


def _earlier_speed(root: pathlib.Path) -> dict[str, float]:
    """What the run that scored the texts said of it."""
    path = root / "seam.json"
    summary = json.loads(path.read_text()) if path.exists() else {}
    return {key: summary[key] for key in _SPEED if key in summary}


def _others(config: SeamConfig) -> dict[str, list[Line]]:
    """Lines of the runs to compare with.

    Raises:
        ValueError: see `read_scores`; or lines of an earlier version.
    """
    named = configs.parse_named(config.compare, "compare")
    found = {name: read_scores(path) for name, path in named.items()}
    for name, lines in found.items():
        if any("occurrence" not in line for line in lines):
            raise ValueError(
                f"compare {named[name]}: its lines have no `occurrence`, which tells "
                "equal prompts apart: an earlier version wrote them; run its command "
                "again, which scores nothing anew"
            )
    return found


def read_scores(path: str) -> list[Line]:
    """The lines of a seam.jsonl.

    Raises:
        ValueError: no such file, or lines that are none of `seam`.
    """
    try:
        text = pathlib.Path(path).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    if not text.strip():
        raise ValueError(
            f"{path}: has no line: no prompt has a score; set_aside.jsonl beside it "
            "says why"
        )
    lines = []
    for number, line in enumerate(text.rstrip("\n").split("\n"), start=1):
        try:
            row = json.loads(line)
            _ = row["seam"], row["estimator"], row["prompt"]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(
                f"{path}:{number}: expected a line of a seam.jsonl, with seam, "
                f"estimator and prompt, got {line[:80]!r}"
            ) from None
        lines.append(row)
    return lines
