"""`attributes:DIR` is a reward like any other: the head's numbers on the states."""

import json

import numpy as np
import pytest

from rlhf_jax import config as configs
from rlhf_jax.__main__ import main
from rlhf_jax.algorithms.gate import GateConfig
from rlhf_jax.data.encode import Encoder
from rlhf_jax.data.encoded import EncodedCompletion
from rlhf_jax.data.layout import pack_completions
from rlhf_jax.programs import attribute_model
from rlhf_jax.programs.adversary import open_adversary
from rlhf_jax.programs.attribute_model import AttributeModel
from rlhf_jax.programs.attributes import AttributesConfig
from rlhf_jax.programs.models import resolve
from rlhf_jax.programs.rewards import kind_of, open_rewards
from rlhf_jax.programs.scorer import ScoringConfig, open_scorer
from rlhf_jax.testing import tiny_tokenizer
from tests.compiled import alone
from tests.states import slow_states

GATE = GateConfig(width=16, layers=2, temperature=2.0)
WIDTH = resolve("tiny").config.hidden_size
LONG = "Sort these words by length and count each of them once: "
ROWS = [
    {"prompt": LONG + "cat bird", "chosen": "cat bird 2", "rejected": "bird cat"},
    {"prompt": LONG + "red green", "chosen": "2 2 2 2", "rejected": "green"},
    {"prompt": "Count: a b", "completion": "2"},
    {"prompt": LONG + "cat bird", "completion": "I count two words, cat and bird."},
]


def known_model():
    """Numbers that no training gives: every part of the head matters."""
    rng = np.random.default_rng(0)

    def layer(rows, columns):
        kernel = rng.normal(size=(rows, columns)) / np.sqrt(rows)
        return {"kernel": np.float32(kernel), "bias": np.float32(rng.normal(size=1))}

    gate = {f"hidden_{n}": layer(size, 16) for n, size in enumerate((WIDTH, 16))}
    gate |= {"out": layer(16, 3), "log": {"scale": np.float32(0.7)}}
    gate["out"]["bias"] = np.float32(rng.normal(size=3))
    return AttributeModel(
        names=("clear", "right", "verbose"),
        weights=rng.normal(size=(3, WIDTH)),
        penalties=np.array([0.3, -0.2, 1.0]),
        verbosity=2,
        gate=gate,
        config=GATE,
    )


def slow_rewards(model, texts):
    """The head on states of sequences by themselves, in float64."""
    encoder = Encoder(tiny_tokenizer())
    encoded = [encoder.encode(*text) for text in texts]
    whole = [[*e.prompt, *e.completion] for e in encoded]
    hidden, states = np.split(slow_states([e.prompt for e in encoded] + whole), 2)
    attributes = states @ model.weights.T
    attributes = attributes - model.penalties * attributes[:, [model.verbosity]]
    for n in range(GATE.layers):
        layer = model.gate[f"hidden_{n}"]
        hidden = np.maximum(hidden @ layer["kernel"] + layer["bias"], 0)
    logits = hidden @ model.gate["out"]["kernel"] + model.gate["out"]["bias"]
    weights = np.exp(logits / GATE.temperature)
    weights /= weights.sum(axis=1, keepdims=True)
    return np.exp(model.gate["log"]["scale"]) * (weights * attributes).sum(axis=1)


def write_reward(out, **changes):
    out.mkdir(exist_ok=True)
    fields = {"model": "tiny", "out": str(out), "data": ["d"], "pairs": ["p"]}
    config = AttributesConfig(**fields | {"seed": 3, "gate": GATE} | changes)
    card = {"model": config.model, "config": configs.to_dict(config)}
    attribute_model.save(out, known_model(), card)
    return f"attributes:{out}"


@pytest.fixture
def one_device():
    with alone():
        yield


def test_score_gives_the_heads_numbers_on_the_states(tmp_path, one_device):
    """Rows of several shapes, with prompts that are shared and others that are not."""
    spec = write_reward(tmp_path / "reward")
    data, out = tmp_path / "rows.jsonl", tmp_path / "scored.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    main(["score", "--model", spec, "--data", str(data), "--out", str(out)])
    found, texts = [], []
    for row in map(json.loads, out.read_text().splitlines()):
        for side in ("chosen", "rejected", "completion"):
            if side in row:
                name = "reward" if side == "completion" else f"{side}_reward"
                found.append(row[name])
                texts.append((row["prompt"], row[side]))
    assert len(found) == 6
    expected = slow_rewards(known_model(), texts)
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.slow
def test_it_is_a_reward_of_rl_with_a_weight_and_a_name(tmp_path, one_device):
    spec = write_reward(tmp_path / "reward")
    texts = [(row["prompt"], row["completion"]) for row in ROWS[2:]]
    rewards = open_rewards([f"0.5*{spec}"], timeout_s=60)
    found = rewards(*zip(*texts, strict=True), [{}] * len(texts))
    expected = slow_rewards(known_model(), texts)
    np.testing.assert_allclose(found.columns["reward"], expected, atol=1e-4)
    np.testing.assert_allclose(found.total, 0.5 * expected, atol=1e-4)


@pytest.mark.slow
def test_rloo_takes_a_step_under_it(tmp_path):
    spec = write_reward(tmp_path / "reward")
    main([
        "rloo", "--model", "tiny", "--run_dir", str(tmp_path / "run"),
        "--data", "testbed:rl?size=16", "--batch_size", "8", "--steps", "1",
        "--sampling.max_new_tokens", "8", "--reward", spec,
    ])  # fmt: skip
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert np.isfinite(line["reward/proxy"])


def test_the_prompts_last_token_is_found_in_every_layout():
    """Token ids are numbered, so a token says where it is from."""
    ids = iter(range(1, 1000))
    prompts = [[next(ids) for _ in range(size)] for size in (9, 12, 3)]
    items = [
        EncodedCompletion(prompts[n], [next(ids) for _ in range(size)])
        for n, size in ((0, 2), (0, 1), (1, 3), (2, 2), (1, 1))
    ]
    alone = EncodedCompletion([], [next(ids), next(ids)])
    layouts = {
        "padded": {},
        "packed": {"row_length": 40},
        "shared": {"row_length": 40, "blocks": [[0, 1], [2, 4], [3], [5]]},
    }
    for layout, options in layouts.items():
        sequences, score_at, order = pack_completions(
            [*items, alone], layout=layout, **options
        )
        ends = np.asarray(attribute_model.prompt_ends(sequences, score_at))
        for item, place in zip(items, order):
            row, slot = divmod(int(place), score_at.shape[1])
            assert sequences.tokens[row, ends[row, slot]] == item.prompt[-1]
            assert sequences.tokens[row, score_at[row, slot]] == item.completion[-1]
        assert ends.reshape(-1)[order[-1]] == -1


def test_what_it_cannot_be_is_said(tmp_path):
    spec = write_reward(tmp_path / "reward")
    assert kind_of("attributes:reward") == "model"  # no function of that name
    with pytest.raises(ValueError, match="no attributes.npz; make one with"):
        open_scorer(f"attributes:{tmp_path}", ScoringConfig())
    with pytest.raises(ValueError, match="the template tokenizer, got plain; set"):
        open_scorer(spec, ScoringConfig(template="plain"))
    with pytest.raises(ValueError, match=f"attributes:{tmp_path}/reward scores with"):
        open_scorer(str(tmp_path / "reward"), ScoringConfig())
    with pytest.raises(ValueError, match="gradient of one reward model"):
        open_adversary(spec, ScoringConfig(), candidates=1)
    gone = write_reward(tmp_path / "gone", model="no-such-model")
    with pytest.raises(ValueError, match="gone: the model that it reads: .*no-such"):
        open_scorer(gone, ScoringConfig())
