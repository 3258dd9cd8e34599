"""`seam` on eight devices: the numbers of one, however the mesh is cut."""

import json

import jax
import pytest

from rlhf_jax import sharding
from rlhf_jax.programs import likelihood, scorer, seam, seam_checks
from rlhf_jax.programs.scorer import ScoringConfig
from rlhf_jax.sharding import MeshConfig

pytestmark = [pytest.mark.multi_device, pytest.mark.slow]


def scored(folder, mesh):
    root = seam.run(
        seam.SeamConfig(
            run_dir=str(folder),
            policy="testbed",
            reward="testbed",
            data=["testbed:worse?size=6&count=3"],
            estimators=["given"],
            scoring=ScoringConfig(untrained_head=True, mesh=mesh),
        )
    )
    return [json.loads(line) for line in (root / "seam.jsonl").read_text().splitlines()]


def test_eight_devices_score_as_one(tmp_path, monkeypatch):
    meshes = [MeshConfig(), MeshConfig(data=2, fsdp=2, tensor=2)]
    found = [scored(tmp_path / str(n), mesh) for n, mesh in enumerate(meshes)]

    def one(config):
        return sharding.make_mesh(config, devices=jax.devices()[:1])

    for module in (likelihood, scorer, seam_checks):
        monkeypatch.setattr(module, "make_mesh", one)
    alone = scored(tmp_path / "one", MeshConfig())
    for lines in found:
        for a, b in zip(lines, alone, strict=True):
            assert a["gold_reward"] == pytest.approx(b["gold_reward"], abs=1e-4)
            for x, y in zip(a["worse"], b["worse"], strict=True):
                # A sum over tokens: each has the tolerance of a model.
                tolerance = 1e-4 * x["num_tokens"]
                assert x["logprob"] == pytest.approx(y["logprob"], abs=tolerance)
                assert x["reward"] == pytest.approx(y["reward"], abs=1e-4)
