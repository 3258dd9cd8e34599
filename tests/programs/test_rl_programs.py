"""`rloo` and `ppo` with tiny models: reference, critic, checkpoints, bad input."""

import dataclasses
import gzip
import json
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from rlhf_jax.__main__ import main
from rlhf_jax.algorithms import ppo as ppo_algorithm
from rlhf_jax.algorithms.policy import policy_apply
from rlhf_jax.algorithms.sft import sft_objective
from rlhf_jax.algorithms.update import init_state, make_update
from rlhf_jax.data.encode import Encoder
from rlhf_jax.data.encoded import EncodedCompletion
from rlhf_jax.data.tokenizers import save_tokenizer
from rlhf_jax.evals.verifiable import exact_number
from rlhf_jax.io.checkpoint import load_params
from rlhf_jax.models import hf
from rlhf_jax.models.config import LoraConfig
from rlhf_jax.programs import experience as xp
from rlhf_jax.programs import ppo, ppo_targets, rl_setup, rloo, runs, scorer, sharded
from rlhf_jax.programs.models import load_policy, load_reward_model
from rlhf_jax.programs.reinforcement import Learner, RLCursor
from rlhf_jax.programs.rewards import RewardResult
from rlhf_jax.sampling.generate import SamplingConfig
from rlhf_jax.testing import (
    tiny_config,
    tiny_llama,
    tiny_reward_model,
    tiny_tokenizer,
)
from tests.compiled import alone, compiled_once
from tests.ragged import LAYOUTS, packing, ragged, table, table_apply

GOLD = "rlhf_jax.testbed:gold_rewards"
STEPS = 2
CONFIG = tiny_config(num_layers=1)


def endings():
    """Words that end a completion: with an eighth of them, lengths are ragged."""
    tokenizer, found = tiny_tokenizer(), []
    for word in tokenizer.get_vocab():
        ids = tokenizer(word, add_special_tokens=False)["input_ids"]
        if word.isalpha() and len(ids) == 1:
            found.append(word)
    return sorted(found)[:64]


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    """One compilation a module for what several runs have in common."""
    with compiled_once(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture
def one_device():
    with alone():
        yield


def write_model(path, params, kind="causal", template=None):
    tokenizer = tiny_tokenizer()
    if template is not None:
        tokenizer.chat_template = template
    hf.export_hf(path, CONFIG, params, kind=kind)
    save_tokenizer(tokenizer, path)
    return str(path)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("policy"), tiny_llama(CONFIG)[1])


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    params = tiny_reward_model(CONFIG, seed=3)[1]
    return write_model(tmp_path_factory.mktemp("reward"), params, "reward")


def arguments(program, policy, run_dir, *more):
    return [
        program, "--model", policy, "--run_dir", str(run_dir),
        "--data", "testbed:rl?size=16", "--batch_size", "8", "--steps", str(STEPS),
        "--sampling.max_new_tokens", "8", "--stop", json.dumps(endings()), *more,
    ]  # fmt: skip


def lines_of(run_dir):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


# RLOO with LoRA, old log-probabilities computed anew.


@pytest.fixture(scope="module")
def lora_run(policy, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "lora"
    main(arguments(
        "rloo", policy, run_dir, "--reward", GOLD, "--lora.rank", "2",
        "--recompute_logprobs", "true", "--accum_steps", "2",
        "--optimizer.learning_rate", "0.03",
        "--eval_data", "held=testbed:rl?size=5", "--loop.save_every", "1",
        "--gold", GOLD,
    ))  # fmt: skip
    return run_dir


def test_first_epoch_ratio_is_exactly_one_with_recomputed_logprobs(lora_run):
    steps = lines_of(lora_run)[1:]
    assert [line["step"] for line in steps] == [1, 2]
    for line in steps:
        assert line["policy/ratio"] == 1.0
        assert line["policy/kl_step"] == 0.0
        assert line["policy/clip_fraction"] == 0.0
        assert 1 < line["completion/length"] < 8  # ragged
    # At the start the adapters change nothing, then the policy leaves its base.
    assert abs(steps[0]["policy/kl"]) < 1e-4 < abs(steps[1]["policy/kl"])


def test_metrics_hold_rewards_gold_and_evaluations(lora_run):
    first, *_, last = lines_of(lora_run)
    assert first["step"] == 0
    for line in (first, last):
        assert line["eval/held/proxy"] == line["eval/held/gold"]
        assert 0 <= line["eval/held/eos_rate"] <= 1
    assert last["reward/proxy"] == last["reward/gold"]
    np.testing.assert_allclose(last["reward/gold_correlation"], 1)
    assert last["completion/counted"] == 1
    rows = (lora_run / "samples.jsonl").read_text().splitlines()
    samples = [json.loads(row) for row in rows]
    assert [row["step"] for row in samples] == [1] * 4 + [2] * 4
    assert {"prompt", "completion", "reward", "gold", "kl", "tokens"} <= set(samples[0])


def test_lora_run_is_adapters_on_a_base_and_loads_merged(lora_run, policy):
    leaves = traverse_util.flatten_dict(load_params(lora_run), sep="/")
    assert {name.rsplit("/", 1)[1] for name in leaves} == {"lora_a", "lora_b"}
    merged = load_policy(str(lora_run))
    base = load_policy(policy)
    assert jax.tree.structure(merged.params) == jax.tree.structure(base.params)
    adapted = {path.split("/")[-2] for path in leaves}
    for path, leaf in traverse_util.flatten_dict(merged.params, sep="/").items():
        other = traverse_util.flatten_dict(base.params, sep="/")[path]
        moved = path.split("/")[-2] in adapted and path.endswith("kernel")
        assert np.array_equal(leaf, other) != moved, path


def test_finished_run_is_exported_and_refused_as_a_reward(lora_run, tmp_path, capsys):
    main(["export", "--model", str(lora_run), "--out", str(tmp_path / "out")])
    again, run = load_policy(str(tmp_path / "out")), load_policy(str(lora_run))
    for a, b in zip(
        jax.tree.leaves(again.params), jax.tree.leaves(run.params), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(SystemExit) as stopped:
        main(["score", "--model", str(lora_run), "--data", "testbed:val_id?size=2"])
    assert stopped.value.code == 2
    assert "no reward head" in capsys.readouterr().err


def live_copies(shape):
    """Arrays of this global shape by their memory, which holding them keeps theirs."""
    return {
        array.addressable_shards[0].data.unsafe_buffer_pointer(): array
        for array in jax.live_arrays()
        if array.shape == shape and not array.is_deleted()
    }


@pytest.mark.parametrize("rank", [2, 0])
def test_reference_is_the_base_without_a_second_copy_under_lora(
    one_device, policy, tmp_path, rank
):
    shape = (CONFIG.hidden_size, CONFIG.intermediate_size)
    kernel = (1, *shape)  # layers are stacked
    bare, base = tiny_llama(CONFIG)
    before = live_copies(kernel)
    config = rloo.RlooConfig(
        run_dir=str(tmp_path / "run"),
        model=policy,
        data=["testbed:rl?size=8"],
        reward=[GOLD],
        batch_size=8,
        lora=LoraConfig(rank=rank),
        sampling=SamplingConfig(num_samples=2, max_new_tokens=8),
    )
    with rl_setup.open_rl(config) as setting:
        tx = rloo.make_optimizer(config.optimizer, lambda step: 0.1)
        state = sharded.create_state(
            setting.trained, tx, setting.mesh, frozen=setting.frozen
        )
        moments = 0 if rank else 2
        gate_and_up = 2
        new = set(live_copies(kernel)) - set(before)
        copies = len(new) / gate_and_up - moments
        assert copies == (1 if rank else 2)

        def learn(state):
            moved = jax.tree.map(lambda x: x + 0.3, state.params)
            return dataclasses.replace(state, params=moved)

        # As an update does: every leaf of the old state is given away.
        state = jax.jit(learn, donate_argnums=0)(state)
        completions = ragged(8, 2, tokens=np.arange(96, dtype=np.int32).reshape(16, 6))
        rows = xp.pack(completions, np.arange(16), setting.packing, rows=None).sequences
        found = setting.ref_logprobs(state, setting.put(rows))
        apply = policy_apply(bare, temperature=1.0, deterministic=True)
        expected = jax.jit(apply)(base, rows, jax.random.key(0))[0]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
        params = {**state.params} if not rank else None
        if params:  # the policy itself has moved
            now = setting.logprobs(params, setting.put(rows))
            assert float(jnp.abs(now - found).max()) > 0.1


# PPO from a reward model.


def test_critic_starts_from_the_reward_model(
    one_device, policy, reward_model, tmp_path
):
    """The value behind a completion's last token is the reward model's score of it."""
    config = ppo.PpoConfig(
        run_dir=str(tmp_path / "run"),
        model=policy,
        data=["testbed:rl?size=8"],
        reward=[f"0.5*{reward_model}"],
        batch_size=8,
        sampling=SamplingConfig(max_new_tokens=8),
    )
    completions = ragged(4, 2, length=6)
    with rl_setup.open_rl(config) as setting:
        critic, _, values = ppo._critic(config, setting)
        loaded = load_reward_model(reward_model)
        for a, b in zip(
            jax.tree.leaves(critic.params), jax.tree.leaves(loaded.params), strict=True
        ):
            np.testing.assert_array_equal(a, b)
        lengths = completions.mask.sum(axis=1)
        longer = dataclasses.replace(
            completions,
            mask=np.arange(7) < lengths[:, None] + 1,
            tokens=np.pad(completions.tokens, ((0, 0), (0, 1))),
        )
        found = xp.forward(
            lambda rows: values(critic, setting.put(rows)),
            longer,
            setting.packing,
            chunk=8,
        )
    at_end = np.take_along_axis(found, lengths[:, None], axis=1)[:, 0]
    judge = scorer.open_scorer(reward_model, scorer.ScoringConfig())
    encoded = [
        EncodedCompletion(
            completions.prompt(m // 2).tolist(),
            completions.tokens[m, : lengths[m]].tolist(),
        )
        for m in range(8)
    ]
    np.testing.assert_allclose(at_end, judge.rewards(encoded), rtol=1e-4, atol=1e-5)


def test_critic_must_share_the_policys_tokenizer(policy, tmp_path, capsys):
    other = write_model(
        tmp_path / "other",
        tiny_reward_model(CONFIG)[1],
        "reward",
        template="{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}",
    )
    with pytest.raises(SystemExit) as stopped:
        main(arguments("ppo", policy, tmp_path / "run", "--reward", other))
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert f"critic {other}: its tokenizer or template is not the policy's" in err


# Supervised rows beside experience.


def test_ptx_rows_are_weighed_against_the_counted_tokens(tmp_path):
    """And accumulation leaves losses and parameters alone."""
    completions = ragged(4, 2)
    completions.counts = completions.stopped
    assert not completions.counts.all()
    loss = ppo_targets.PpoLossConfig(ptx_coef=0.5)
    done, _ = ppo_targets.make_targets(loss, completions, RLCursor())
    counted = int(completions.mask[completions.counts].sum())
    policy = ppo_algorithm.ppo_objective(table_apply)
    sft = sft_objective(lambda p, s, k: table_apply(p, s, k)[0])
    objective = ppo_algorithm.with_ptx(policy, sft, ptx_coef=0.5)
    tx = rloo.make_optimizer(rloo.OptimizerConfig(), lambda step: 0.1)
    results = []
    for accum_steps in (1, 2):
        config = ppo.PpoConfig(
            run_dir="run",
            model="m",
            data=["d"],
            reward=["r"],
            ptx_data=["testbed:sft?size=16"],
            batch_size=4,
            accum_steps=accum_steps,
            loss=loss,
        )
        setting = types.SimpleNamespace(
            encoder=Encoder(tiny_tokenizer()), run_dir=tmp_path, packing=packing()
        )
        [batch] = xp.minibatches(
            done,
            packing(),
            count=1,
            accum_steps=accum_steps,
            rng=np.random.default_rng(0),
        )
        rows = ppo._ptx_rows(config, setting)
        mixed = rows(3, batch)
        supervised = mixed.ptx.completion_mask.sum()
        np.testing.assert_allclose(mixed.ptx_scale, counted / supervised, rtol=1e-6)
        again = rows(3, batch)  # a function of the update's number: resume finds it
        np.testing.assert_array_equal(again.ptx.tokens, mixed.ptx.tokens)
        assert not np.array_equal(rows(2, batch).ptx.tokens, mixed.ptx.tokens)
        params = {"w": jnp.tile(table()["w"], 26)}  # for the testbed's vocabulary
        update = jax.jit(make_update(objective, tx, accum_steps=accum_steps))
        results.append(update(init_state(params, tx), mixed, jax.random.key(0)))
    (full, expected), (parts, report) = results
    np.testing.assert_allclose(parts.params["w"], full.params["w"], atol=1e-4)
    for name, value in expected.items():
        np.testing.assert_allclose(report[name], value, rtol=1e-5, atol=1e-6)


# A setting without its loop.


def check_ratios(setting, state, completions):
    """The sampler's log-probabilities are those of the forward of training."""
    lengths = completions.mask.sum(axis=1)
    assert len(set(lengths.tolist())) > 4
    for layout in LAYOUTS:
        now = xp.forward(
            lambda rows: setting.logprobs(state.params, setting.put(rows)),
            completions,
            dataclasses.replace(setting.packing, layout=layout),
            chunk=32,
        )
        ratio = np.exp(now - completions.old_logprobs)[completions.mask]
        assert len(ratio) == lengths.sum()
        np.testing.assert_allclose(ratio, 1, atol=1e-4, err_msg=layout)


def test_gather_measures_what_it_sampled_and_evaluates_with_the_same_noise(
    one_device, policy, tmp_path
):
    config = rloo.RlooConfig(
        run_dir=str(tmp_path / "run"),
        model=policy,
        data=["testbed:rl?size=16"],
        eval_data=["held=testbed:rl?size=5"],
        reward=[GOLD],
        stop=endings(),
        batch_size=8,
        sampling=SamplingConfig(num_samples=4, max_new_tokens=8, temperature=0.7),
        shaping=xp.ShapingConfig(truncated="penalise", missing_eos_penalty=2.0),
    )
    judged = []

    def score(texts):
        judged.append(len(texts.completions))
        found = np.array([len(text) / 7 - 1 for text in texts.completions])
        return RewardResult(found, {"length": found})

    with rl_setup.open_rl(config) as setting:
        setting = dataclasses.replace(
            setting, rewards=types.SimpleNamespace(score=score)
        )
        state = sharded.create_state(
            setting.trained, rloo.make_optimizer(config.optimizer, lambda s: 0.0),
            setting.mesh,
        )  # fmt: skip
        learner, cursor = Learner(state), RLCursor()
        completions, metrics, table = setting.gather(learner, cursor)
        assert cursor.next_row == 8 and judged == [32]
        again, same, _ = setting.gather(learner, RLCursor())
        np.testing.assert_array_equal(again.tokens, completions.tokens)
        later, _, _ = setting.gather(learner, RLCursor(step=1))
        assert not np.array_equal(later.tokens, completions.tokens)
        check_ratios(setting, learner.policy, completions)
        judged.clear()
        evaluations = [setting.evaluate(learner) for _ in range(2)]
    assert evaluations[0] == evaluations[1]
    assert judged == [20, 20]  # the five prompts, not those that fill the batch
    cut = ~completions.stopped
    assert 0 < cut.sum() < 32
    np.testing.assert_allclose(
        metrics["reward/proxy"] - metrics["reward/score"], 2 * cut.mean(), rtol=1e-5
    )
    assert metrics["completion/length"] == completions.mask.sum(axis=1).mean()
    # The policy is its own reference.
    assert np.abs(completions.kl).max() < 1e-4
    assert len(table) == 8 and table[0]["tokens"] == completions.mask[0].sum()
    assert same["reward/proxy"] == metrics["reward/proxy"]


# Bad input: one clear message, before anything is sampled.


def check_refused(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    err = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in err
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize(
    ("program", "flags", "message"),
    [
        ("rloo", ["--sampling.num_samples", "1"], "num_samples: expected at least 2"),
        ("rloo", ["--minibatches", "3"], "a multiple of minibatches 3 x accum_steps 1"),
        ("ppo", ["--accum_steps", "3"], "a multiple of minibatches 1 x accum_steps 3"),
        ("rloo", ["--batch_size", "4"], "a multiple of the 8 devices"),
        ("rloo", ["--seed", "-1"], "seed: expected at least 0, got -1"),
        ("rloo", ["--epochs", "0"], "epochs: expected at least 1, got 0"),
        ("rloo", ["--stop", "cat dog"], "stop 'cat dog': expected one token"),
        ("rloo", ["--reward", "nowhere:f"], "cannot import"),
        ("rloo", ["--reference", "nowhere"], "model 'nowhere': not found"),
        ("ppo", ["--loss.ptx_coef", "0.1"], "expected both or neither"),
        ("ppo", ["--ptx_data", "testbed:sft"], "expected both or neither"),
        ("ppo", ["--loss.critic_warmup", "2"], "expected fewer than steps 2"),
        ("ppo", ["--critic", "nowhere"], "model 'nowhere': not found"),
        (
            "ppo",
            ["--loss.kl_target", "1", "--loss.kl_horizon", "1"],
            "kl_horizon 1: expected more than 1.6",
        ),
        (
            "rloo",
            ["--sampling.max_new_tokens", "300"],
            "leaves no room for a prompt in 256 tokens",
        ),
    ],
)
def test_wrong_input_is_one_clear_message(
    policy, tmp_path, capsys, program, flags, message
):
    argv = arguments(program, policy, tmp_path / "run", "--reward", GOLD, *flags)
    check_refused(argv, message, capsys)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_unusable_prompts_are_set_aside_and_counted(policy, tmp_path, capsys):
    """An empty and an over-long prompt; the run's own limit leaves room to answer."""
    rows = tmp_path / "rows.jsonl"
    prompts = ["Sort 3 1.", "", "cat " * 200]

    def refused(prompts, message, *more):
        rows.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
        argv = [
            "rloo", "--model", policy, "--run_dir", str(tmp_path / "run"),
            "--reward", GOLD, "--data", str(rows), "--batch_size", "8",
            "--sampling.max_new_tokens", "100", *more,
        ]  # fmt: skip
        return check_refused(argv, message, capsys)

    err = refused(prompts, "stop 'cat dog'", "--stop", "cat dog")
    assert "1 of 3 rows kept; set aside: 1 empty, 1 over_long" in err
    aside = (tmp_path / "run" / "set_aside" / "train.jsonl").read_text().splitlines()
    reasons = {json.loads(line)["reason"]: json.loads(line) for line in aside}
    assert set(reasons) == {"empty", "over_long"}
    assert "> 156" in reasons["over_long"]["detail"]
    refused(prompts[1:], "none of 2 rows is left: 1 empty")
    refused(prompts, "empty row", "--rows.empty", "error")


# A reward that can be checked.


@pytest.mark.slow
def test_gsm8k_recipe_rewards_exact_answers(test_data, policy, tmp_path, one_device):
    data = test_data / "data" / "gsm8k.jsonl.gz"
    config = pathlib.Path(__file__).parents[2] / "configs/rloo/smollm2-135m-gsm8k.yaml"
    main([
        "rloo", "--config", str(config), "--model", policy, "--run_dir", str(tmp_path),
        "--data", f"{data}?split=train&sample=64", "--batch_size", "8",
        "--eval_data", f"test={data}?split=test&sample=8", "--loop.samples", "32",
        "--steps", "2", "--sampling.num_samples", "4", "--sampling.max_new_tokens", "8",
    ])  # fmt: skip
    with gzip.open(data, "rt") as file:
        answers = {row["prompt"]: row["answer"] for row in map(json.loads, file)}
    lines = (tmp_path / "samples.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert [sample["step"] for sample in samples] == [1] * 8 + [2] * 8
    for sample in samples:
        prompt = sample["prompt"]
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        wanted = exact_number(sample["completion"], answers[text])
        assert sample["reward"] == wanted
    before, first, last = lines_of(tmp_path)
    for line in (first, last):
        assert 0 <= line["reward/proxy"] <= 1 and line["train/update/finite"] == 1
    assert 0 <= before["eval/test/proxy"] <= 1


def test_evaluation_prompts_may_not_take_the_name_of_the_training_prompts(tmp_path):
    """The held-out prompts would be trained on."""
    with pytest.raises(ValueError, match="the name 'train' is taken"):
        runs.prepare_sets(
            lambda *_, **__: pytest.fail("read"),
            None,
            {"train": "x.jsonl"},
            None,
            tmp_path,
        )


def test_greedy_completions_teach_rloo_nothing():
    with pytest.raises(ValueError, match="temperature: expected a number above 0"):
        rloo.RlooConfig(
            run_dir="r",
            model="tiny",
            data=["p.jsonl"],
            reward=[GOLD],
            sampling=SamplingConfig(num_samples=2, max_new_tokens=4, temperature=0.0),
        )
