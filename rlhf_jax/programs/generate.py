"""`rlhf-jax generate`: prompts in, sampled completions out, as JSON lines.

Read `run`: prompts are taken in batches, continued, scored if rewards are named, and
written before the next batch. With a reward and a gold reward and several samples a
prompt, `--report DIR` adds the best-of-n curve.
"""

import contextlib
import dataclasses
import itertools
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import IO, Any

import numpy as np

from rlhf_jax.data import prepare
from rlhf_jax.data.prepare import DataConfig
from rlhf_jax.data.texts import Texts
from rlhf_jax.evals.best_of_n import best_of_n
from rlhf_jax.io import report
from rlhf_jax.io.run_dir import write_atomic
from rlhf_jax.models.config import ComputeConfig
from rlhf_jax.programs import experience as xp
from rlhf_jax.programs.rewards import Rewards, open_rewards
from rlhf_jax.programs.sampler import open_sampler
from rlhf_jax.programs.scorer import ScoringConfig
from rlhf_jax.sampling.generate import SamplingConfig
from rlhf_jax.sharding import MeshConfig, make_mesh
from rlhf_jax.types import Rollout


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Sample completions from a policy."""

    model: str
    """Policy: run directory, HF directory, hub id or .gguf."""
    data: list[str]
    """Prompts, SPEC; repeat for several."""
    out: str = "-"
    """JSON lines file to write, or - for stdout: one line a completion."""
    overwrite: bool = False
    """Replace `out` where it exists."""
    grouped: bool = False
    """Write one line a prompt, with its completions as `responses`: what --shifted of
    meta-reward and K-wise data take. Needs sampling.num_samples above 1."""
    reward: list[str] = dataclasses.field(default_factory=list)
    """[WEIGHT*]SPEC of a reward model, package.module:function or http://...: adds
    reward; repeat to add."""
    gold: str | None = None
    """A reward beside it: adds gold."""
    report: str | None = None
    """Directory for best_of_n.json, its plot and report.html; needs reward, gold and
    sampling.num_samples above 1."""
    stop: list[str] = dataclasses.field(default_factory=list)
    """Tokens that end a completion, besides the template's end token."""
    batch_size: int = 32
    """Prompts continued together; rounded up to a multiple of the devices."""
    seed: int = 0
    """Seed of the sampling."""
    timeout_s: float = 60.0
    """Longest time of one call of a reward function or HTTP scorer."""
    sampling: SamplingConfig = SamplingConfig(max_new_tokens=128)
    """How completions are drawn."""
    rows: DataConfig = DataConfig()
    """How prompts are read."""
    scoring: ScoringConfig = ScoringConfig()
    """How reward models score."""
    compute: ComputeConfig = ComputeConfig(scan_layers=False)
    """dtype, attention backend."""
    mesh: MeshConfig = MeshConfig()
    """Devices: data x fsdp x tensor."""

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("data: expected at least one --data SPEC")
        if self.batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {self.batch_size}")
        if self.grouped and self.sampling.num_samples < 2:
            raise ValueError(
                f"grouped: expected sampling.num_samples above 1 with it, got "
                f"{self.sampling.num_samples}"
            )
        enough = self.reward and self.gold and self.sampling.num_samples > 1
        if self.report is not None and not enough:
            raise ValueError(
                "report: expected --reward, --gold and sampling.num_samples above 1 "
                "with it: best-of-n picks by one and judges by the other"
            )


def run(config: GenerateConfig) -> int:
    """Samples and writes; returns the number of completions.

    Raises:
        ValueError: `out` exists, no model, no prompt, or a reward fails.
    """
    mesh = make_mesh(config.mesh)
    with contextlib.ExitStack() as stack:
        _check_output(config)
        opened = open_sampler(config, mesh)
        encoder, size = opened.encoder, opened.together
        rows = dataclasses.replace(config.rows, max_prompt_length=opened.prompt_limit)
        prompts, account = prepare.prepare_prompts(config.data, encoder, rows)
        print(account.summary(), file=sys.stderr)
        for dropped in account.dropped:
            print(
                f"{dropped.where}: {dropped.reason}: {dropped.detail}", file=sys.stderr
            )
        judges = _judges(config, encoder)
        out = stack.enter_context(_output(config))
        scores: dict[str, list[np.ndarray]] = {name: [] for name in judges}
        written = 0
        for start in range(0, len(prompts), size):
            batch = [prompts[n] for n in range(start, min(start + size, len(prompts)))]
            texts, rollout = opened.sample(batch, start)
            found = {name: xp.score(judge, texts)[0] for name, judge in judges.items()}
            for name, values in found.items():
                scores[name].append(values)
            lines = _lines(texts, rollout, found, config.sampling.num_samples)
            for line in _grouped(lines) if config.grouped else lines:
                out.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
            out.flush()
            written += len(texts.completions)
    if config.report is not None:
        _best_of_n(config, scores)
    return written


def _judges(config: GenerateConfig, encoder: Any) -> dict[str, Rewards]:
    """reward and gold, those that are named."""
    specs = {"reward": config.reward, "gold": [config.gold] if config.gold else []}
    return {
        name: open_rewards(
            found, scoring=config.scoring, timeout_s=config.timeout_s, encoder=encoder
        )
        for name, found in specs.items()
        if found
    }


ANSWERS = ("chosen", "rejected", "responses", "completion", "response", "messages")
"""Columns of a row that hold answers of others: beside the sampled ones they would make
it a row of another kind."""


def _lines(
    texts: Texts, rollout: Rollout, found: dict[str, np.ndarray], samples: int
) -> Iterator[dict[str, Any]]:
    """One line a completion: the row, the completion and its numbers."""
    for m, completion in enumerate(texts.completions):
        real = rollout.mask[m]
        yield {
            "schema": 1,
            **{k: v for k, v in texts.rows[m].items() if k not in ANSWERS},
            "prompt": texts.prompts[m],
            "completion": completion,
            "sample": m % samples,
            "num_tokens": int(real.sum()),
            "stopped": bool(rollout.stopped[m]),
            "logprob": float(rollout.policy_logprobs[m][real].sum()),
            "sampling_logprob": float(rollout.sampling_logprobs[m][real].sum()),
            **{name: float(values[m]) for name, values in found.items()},
        }


def _grouped(lines: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One line a prompt: the row, and `responses` with text, score (the gold reward)
    and reward, where there are some.

    Completions without text, which no reward model can read, are left out and counted;
    so is a prompt that keeps fewer than two.
    """
    names = ("num_tokens", "stopped", "logprob", "sampling_logprob", "sample")
    group: list[dict[str, Any]] = []
    for line in itertools.chain(lines, [{"sample": 0}]):
        if line["sample"] == 0 and group:
            written = [one for one in group if one["completion"].strip()]
            if len(written) < len(group):
                print(
                    f"{len(group) - len(written)} of {len(group)} completions without "
                    f"text: {str(group[0]['prompt'])[:60]!r}",
                    file=sys.stderr,
                )
            if len(written) > 1:
                row = {k: v for k, v in group[0].items() if k not in names}
                for name in ("completion", "reward", "gold"):
                    row.pop(name, None)
                yield row | {"responses": [_response(one) for one in written]}
            group = []
        group.append(line)


def _response(line: dict[str, Any]) -> dict[str, Any]:
    columns = {"completion": "text", "gold": "score", "reward": "reward"}
    return {new: line[old] for old, new in columns.items() if old in line}


def _best_of_n(config: GenerateConfig, scores: dict[str, list[np.ndarray]]) -> None:
    """best_of_n.json and the report."""
    samples = config.sampling.num_samples
    proxy, gold = (
        np.concatenate(scores[name]).reshape(-1, samples) for name in ("reward", "gold")
    )
    curve = best_of_n(proxy, gold)
    folder = pathlib.Path(str(config.report))
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "schema": 1,
        "model": config.model,
        "prompts": len(proxy),
        "samples": samples,
        "curve": {name: values.tolist() for name, values in curve._asdict().items()},
    }
    write_atomic(folder / "best_of_n.json", json.dumps(record) + "\n")
    print(f"report: {report.write_report(folder)}", file=sys.stderr)


def _check_output(config: GenerateConfig) -> None:
    """Before anything is loaded; the file is opened when all of it is."""
    path = pathlib.Path(config.out).expanduser()
    if config.out != "-" and path.exists() and not config.overwrite:
        raise ValueError(
            f"out {config.out}: exists; name another file or set --overwrite true"
        )


@contextlib.contextmanager
def _output(config: GenerateConfig) -> Iterator[IO[str]]:
    if config.out == "-":
        yield sys.stdout
        return
    path = pathlib.Path(config.out).expanduser()
    try:
        file = path.open("w", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"out {config.out}: cannot write there: {error}") from None
    with file:
        yield file
