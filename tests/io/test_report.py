"""report.html: self-contained, complete, and honest about what it could not read."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest

from rlhf_jax.evals import calibration, distribution, rewardbench, rmbench, suite
from rlhf_jax.io import (
    evaluation_plots,
    html,
    metrics,
    plot_style,
    report,
    training_plots,
)

PNG = b"\x89PNG\r\n\x1a\n"


def metrics_rows(steps=120):
    rng = np.random.default_rng(0)
    rows = []
    for step in range(1, steps + 1):
        row = {
            "schema": 1,
            "step": step,
            "train/loss": 0.7 * math.exp(-step / 60) + 0.02 * rng.normal(),
            "train/accuracy": 0.5 + 0.3 * step / steps,
            "train/margin": step / 50,
            "train/learning_rate": 1e-5 * (1 - step / steps),
            "perf/tokens_per_s": 9000.0,
        }
        if step % 30 == 0:
            row |= {"eval/val_id/accuracy": 0.8, "eval/val_ood/accuracy": 0.7}
        rows.append(row)
    return rows


def pair_entry(name, shift=1.0, n=60):
    rng = np.random.default_rng(5)
    chosen, rejected = rng.normal(shift, 1, n), rng.normal(0, 1, n)
    rows = [
        {"prompt": f"p{i // 3}", "chosen": "a " * (i % 9 + 1), "rejected": "a b"}
        for i in range(n)
    ]
    metrics, interval = suite.pair_figures(chosen, rejected, rows)
    return {
        "name": name,
        "kind": "pairs",
        "n": n,
        "available": 100,
        "subset": True,
        "interval": interval,
        "metrics": metrics,
        "reliability": [
            dataclasses.asdict(b) for b in calibration.reliability(chosen - rejected)
        ],
        "histogram": distribution.histograms({"chosen": chosen, "rejected": rejected}),
        "points": {
            "words": [float(i % 9) for i in range(n)],
            "reward": chosen.tolist(),
            "chosen": [True] * n,
        },
        "set_aside": {"empty chosen": 2},
    }


def evaluation():
    gold = [np.arange(4.0)] * 5
    rows = [
        {"responses": [{"text": "a " * (k + 1), "score": k} for k in range(4)]}
        for _ in gold
    ]
    kwise = suite.evaluate_kwise([np.array([0.0, 2.0, 1.0, 3.0])] * 5, rows)
    style = np.arange(3.0) + np.zeros((4, 3))
    domains = ["chat", "code", "safety-refuse", "safety-response"]
    subsets = ["llmbar-natural", "judgebench/<x>", "hep-go"]
    return {
        "schema": 1,
        "model": "runs/tiny",
        "seed": 3,
        "config": {"model": "runs/tiny", "eval_data": ["a=b"]},
        "sets": [
            pair_entry("val_id"),
            pair_entry("val_<ood>", 0.4),
            {
                "name": "quads",
                "kind": "kwise",
                "n": 5,
                "available": 5,
                "subset": False,
                "interval": "95 % bootstrap over prompts",
                "metrics": kwise,
            },
        ],
        "rmbench": {
            "n": 4,
            "available": 395,
            "subset": True,
            "table": rmbench.rmbench_table(style + 0.1, style, domains),
        },
        "rewardbench": {
            "n": 3,
            "available": 3,
            "subset": False,
            "table": rewardbench.rewardbench_table(np.ones(3), np.zeros(3), subsets),
        },
    }


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run with every file, its report written once."""
    tmp_path = tmp_path_factory.mktemp("run")
    write_jsonl(tmp_path / "metrics.jsonl", metrics_rows())
    (tmp_path / "best.json").write_text(
        json.dumps({"step": 90, "metric": "eval/val_id/accuracy", "value": 0.8})
    )
    (tmp_path / "config.yaml").write_text("model: tiny\noptimizer:\n  lr: 1.0e-05\n")
    (tmp_path / "evaluate.json").write_text(json.dumps(evaluation()))
    report.write_report(tmp_path)
    return tmp_path


def test_a_page_needs_nothing_outside_itself(run_dir):
    page = (run_dir / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "<script" not in page
    assert "@import" not in page


def test_every_part_of_a_run_is_on_the_page(run_dir):
    page = (run_dir / "report.html").read_text()
    for text in (
        "Training",
        "Accuracy on pairs",
        "Calibration",
        "Ranking of K completions",
        "RM-Bench",
        "RewardBench-style",
        "optimizer.lr",
        "a seeded subset, 60 of 100 rows (seed 3)",
        "2 rows set aside: empty chosen",
        "No prompt here from: math.",
        "In no section: judgebench/&lt;x&gt;",
    ):
        assert text in page, text
    names = {path.name for path in (run_dir / "plots").iterdir()}
    assert {"training.png", "accuracy.png", "reliability.png", "rmbench.png"} <= names


def test_names_from_data_are_escaped(run_dir):
    page = (run_dir / "report.html").read_text()
    assert "val_<ood>" not in page
    assert "val_&lt;ood&gt;" in page


def test_training_alone_and_evaluation_alone_make_a_page(tmp_path):
    for name in ("train", "eval"):
        (tmp_path / name).mkdir()
    write_jsonl(tmp_path / "train" / "metrics.jsonl", metrics_rows(3))
    assert "3 optimizer steps" in report.write_report(tmp_path / "train").read_text()
    (tmp_path / "eval" / "evaluate.json").write_text(json.dumps(evaluation()))
    assert "Training" not in report.write_report(tmp_path / "eval").read_text()


def test_a_torn_line_is_counted_on_the_page_and_nan_is_a_gap(tmp_path):
    rows = metrics_rows(5)
    rows[2]["train/loss"] = float("nan")
    write_jsonl(tmp_path / "metrics.jsonl", rows)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"schema": 1, "step": 6, "train/l')
    assert "1 line could not be read" in report.write_report(tmp_path).read_text()
    steps, _ = metrics.series(rows, "train/loss")
    assert steps.tolist() == [1, 2, 4, 5]


def test_an_empty_directory_is_an_error_that_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"neither metrics.jsonl .* nor evaluate.json"):
        report.write_report(tmp_path)


def test_a_broken_evaluation_file_is_named(tmp_path):
    (tmp_path / "evaluate.json").write_text("{")
    with pytest.raises(ValueError, match=r"evaluate.json: not JSON"):
        report.write_report(tmp_path)


def test_the_same_files_give_the_same_page(run_dir):
    first = (run_dir / "report.html").read_bytes()
    assert report.write_report(run_dir).read_bytes() == first


def test_no_curve_means_no_figure(tmp_path):
    assert training_plots.training_curves([{"step": 1}], tmp_path / "x.png") is None
    assert not (tmp_path / "x.png").exists()


def test_labels_move_apart_and_keep_their_order():
    placed = plot_style._spread([1.0, 1.0, 0.99, 3.0], 0.5)
    order = sorted(placed)
    assert min(np.diff(order)) >= 0.5 - 1e-9
    assert placed[2] == min(placed)
    assert placed[3] == max(placed)


def test_single_points_and_constant_values_can_be_drawn(tmp_path):
    rows = [{"step": 1, "train/loss": 0.5, "eval/a/loss": 0.5, "eval/b/loss": 0.5}]
    path = training_plots.training_curves(rows, tmp_path / "t.png")
    assert path.read_bytes().startswith(PNG)
    one = {"words": [3], "reward": [1.0], "chosen": [True]}
    path = evaluation_plots.reward_against_length({"a": one}, tmp_path / "l.png")
    assert path.read_bytes().startswith(PNG)


def test_panels_beyond_the_limit_are_said(tmp_path):
    counts = {"edges": [0.0, 1.0], "chosen": [1], "rejected": [1]}
    many = {f"s{i}": counts for i in range(plot_style.MAX_PANELS + 2)}
    assert plot_style.shown(many) == list(many)[: plot_style.MAX_PANELS]
    assert plot_style.left_out(many) == "not drawn: s9, s10"
    evaluation_plots.reward_histograms(many, tmp_path / "h.png")


def test_plots_leave_matplotlibs_global_state_alone(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    evaluation_plots.grouped_bars({"a": {"x": 0.5}}, tmp_path / "g.png", title="t")
    assert dict(matplotlib.rcParams) == before


def test_tables_set_numbers_right_and_say_nothing_as_a_dash():
    table = html.Table(("name", "value"), [("a", 1.5), ("b", None)])
    page = html.render(html.Report("t", sections=[html.Section("s", tables=[table])]))
    assert '<td class="n">1.5000</td>' in page
    assert '<td class="n">–</td>' in page
