"""Diagnostics in a report: every set in the tables, what is not drawn named."""

import numpy as np

from rlhf_jax.evals import contrast_instructions as contrast
from rlhf_jax.evals import hidden_states
from rlhf_jax.io import diagnostics_report as diagnostics
from rlhf_jax.io import plot_style
from rlhf_jax.io.evaluation_report import evaluation_notes


def evaluation(sets):
    rng = np.random.default_rng(0)
    figures = {}
    for n in range(sets):
        states = rng.normal(size=(8, 4)).astype(np.float32)
        pairs = hidden_states.alternating(8 if n % 2 == 0 else 0)
        figures[f"s{n}"] = hidden_states.state_figures(states, states, pairs)
    return {
        "sets": [{"name": name, "metrics": f.metrics} for name, f in figures.items()],
        "states": hidden_states.states_summary(figures, head_norm=1.5),
    }


def test_every_set_is_in_the_tables_and_undrawn_ones_are_named(tmp_path):
    count = len(plot_style.COLOURS) + 2
    section = diagnostics.states_section(evaluation(count), tmp_path)
    norms, ranks = section.tables
    assert [row[0] for row in ranks.rows] == [f"s{n}" for n in range(count)]
    # Two norms a set, and two differences a set of pairs.
    assert len(norms.rows) == 2 * count + 2 * (count // 2)
    assert "not drawn: s6, s7" in section.plots[0].caption
    assert section.plots[0].path.stat().st_size > 1000
    assert "Norm of the head: 1.5000" in " ".join(section.text)


def test_one_set_says_nothing_of_a_spread_across_sets(tmp_path):
    section = diagnostics.states_section(evaluation(1), tmp_path)
    assert "across the sets" not in " ".join(section.text)


def test_a_contrast_set_without_an_answer_is_tabled_but_not_drawn(tmp_path):
    same = contrast.ContrastItem("a", "b", "r", "r")
    table = contrast.contrast_table(np.zeros((1, 4)), [same])
    for figures in table["query"].values():
        # As evaluate.json holds what is not finite.
        figures |= {k: None for k in ("value", "low", "high") if not figures["n"]}
    entry = {"name": "c", "n": 1, "available": 1, "subset": True, "table": table}
    section = diagnostics.contrast_section([entry], tmp_path)
    assert len(section.tables[0].rows) == 4
    assert len(section.plots) == 1
    notes = evaluation_notes({"contrast_instructions": [entry], "seed": 3})
    assert notes == ["c: a seeded subset, 1 of 1 rows (seed 3)."]
