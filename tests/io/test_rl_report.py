"""The report of an RL run shows its curves and samples, whatever is missing."""

import json

import pytest

from rlhf_jax.io.report import write_report
from rlhf_jax.io.rl_report import sample_table


def _run(folder, *, gold=True, samples=True):
    folder.mkdir(exist_ok=True)
    rows = []
    for step in range(1, 30):
        row = {"step": step, "policy/kl": 0.1 * step, "reward/proxy": 0.05 * step}
        row |= {"reward/gold": 0.5} if gold else {}
        rows.append(row)
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    if samples:
        table = [
            {"step": step, "prompt": "p", "completion": f"text <{step}>", "reward": 1.0}
            for step in (1, 10, 29)
        ]
        (folder / "samples.jsonl").write_text("\n".join(map(json.dumps, table)))
    return folder


@pytest.mark.parametrize("gold", [True, False])
def test_report_shows_reward_against_kl_and_samples(tmp_path, gold):
    page = write_report(_run(tmp_path / "run", gold=gold)).read_text()
    assert "Reward against KL" in page
    assert "text &lt;29&gt;" in page
    assert "text &lt;10&gt;" not in page  # the first and the last table
    assert ("No gold reward was given" in page) is not gold
    assert (tmp_path / "run" / "plots" / "over_optimisation.png").exists()


def test_report_does_without_samples(tmp_path):
    page = write_report(_run(tmp_path / "run", samples=False)).read_text()
    assert "Samples" not in page


def test_torn_lines_of_samples_are_left_out(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text('{"step": 1, "prompt": "p", "completion": "c"}\n{"step": 2, "pro')
    table = sample_table(path)
    assert table is not None
    assert len(table.rows) == 1
