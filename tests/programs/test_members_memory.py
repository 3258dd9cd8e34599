"""Members are trained together where they fit, as a function of numbers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import config as configs
from rlhf_jax.models.config import LoraConfig
from rlhf_jax.programs import strength_members
from rlhf_jax.programs.members_memory import (
    decide,
    free_bytes,
    host_free_bytes,
    member_bytes,
)
from rlhf_jax.programs.strength import StrengthConfig
from rlhf_jax.types import Mean

FITS = {"members": 7, "member_bytes": 10**9, "free_bytes": 10 * 10**9}


@pytest.mark.parametrize(
    "change, at_once, why",
    [
        ({}, True, "7 need about 7.0 GB, of 10.0 GB free"),  # 7 of 10 may be filled
        ({"members": 8}, False, "8 need about 8.0 GB, of 10.0 GB free"),
        ({"member_bytes": 10**9 + 1}, False, "7 need about 7.0 GB, of 10.0 GB free"),
        ({"free_bytes": 9 * 10**9}, False, "of 9.0 GB free"),
        ({"free_bytes": None}, False, "does not tell how much memory is free"),
        ({"devices": 2}, False, "each uses all 2 devices, and all at once one"),
        ({"alone": "mesh, accum_steps"}, False, "mesh, accum_steps is not for members"),
    ],
)
def test_together_if_they_fit_the_one_device(change, at_once, why):
    decision = decide(**FITS | change)
    assert decision.at_once is at_once and why in decision.why


def test_a_members_bytes_are_counted_from_its_training():
    """Of sum(sin(x w)) the backward pass needs cos(x w), and x, which is given."""
    params, batch = {"w": jnp.ones((4, 3))}, np.ones((5, 4), np.float32)

    def objective(params, batch, key):
        total = jnp.sum(jnp.sin(batch @ params["w"]))
        return Mean(total, jnp.float32(1)), {}

    weights, cosines, step = 4 * 3 * 4, 5 * 3 * 4, 4
    found = member_bytes(objective, optax.sgd(0.1), params, batch)
    assert found == 2 * weights + step + cosines  # with the gradient
    adam = member_bytes(objective, optax.adam(0.1), params, batch)
    assert adam == found + 2 * weights + step  # two moments and their count
    shapes = jax.eval_shape(lambda: params)
    assert member_bytes(objective, optax.adam(0.1), shapes, batch) == adam


class Device:
    def __init__(self, platform, stats):
        self.platform, self.stats = platform, stats

    def memory_stats(self):
        return self.stats


def test_free_memory_is_the_devices_own_or_the_hosts_of_a_cpu(tmp_path):
    stats = {"bytes_limit": 100, "bytes_in_use": 30}
    assert free_bytes(Device("gpu", stats)) == 70
    assert free_bytes(Device("gpu", None)) is None
    assert free_bytes(Device("cpu", None)) == pytest.approx(host_free_bytes(), rel=0.5)
    assert host_free_bytes(tmp_path) is None  # no Linux
    (tmp_path / "proc").mkdir()
    text = "MemTotal: 900 kB\nMemFree: 100 kB\nMemAvailable:   500 kB\n"
    (tmp_path / "proc" / "meminfo").write_text(text)
    assert host_free_bytes(tmp_path) == 500 * 1024
    group = tmp_path / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    (group / "memory.current").write_text("1000\n")
    (group / "memory.max").write_text("max\n")
    assert host_free_bytes(tmp_path) == 500 * 1024
    (group / "memory.max").write_text("5000\n")
    assert host_free_bytes(tmp_path) == 4000


def config(**changes):
    return StrengthConfig(run_dir="r", model="m", data="d", **changes)


def test_a_run_goes_on_in_the_way_it_was_begun(tmp_path, monkeypatch):
    (tmp_path / "members.json").write_text(json.dumps({"at_once": True}))
    monkeypatch.setattr(strength_members, "_member_bytes", None)  # not asked again
    assert strength_members.at_once(config(), tmp_path, None) is True
    assert strength_members.at_once(config(at_once=False), tmp_path, None) is False


def test_what_members_at_once_cannot_have_decides_or_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(strength_members, "_member_bytes", lambda *_: 1)
    given = config(lora=LoraConfig(rank=2), accum_steps=2)
    assert strength_members.at_once(given, tmp_path, None) is False
    written = json.loads((tmp_path / "members.json").read_text())
    assert written["at_once"] is False and "lora.rank, accum_steps" in written["why"]
    with pytest.raises(ValueError, match="leave out lora.rank, accum_steps, or at_o"):
        config(lora=LoraConfig(rank=2), accum_steps=2, at_once=True)


@pytest.mark.parametrize("text, value", [("null", None), ("true", True)])
def test_the_flag_is_true_false_or_left_to_the_memory(text, value, capsys):
    argv = ["--run_dir=r", "--model=m", "--data=d", "--at_once"]
    found = configs.parse(StrengthConfig, [*argv, text], prog="strength")
    assert found.at_once is value and found == config(at_once=value)
    with pytest.raises(SystemExit):
        configs.parse(StrengthConfig, [*argv, "some"], prog="strength")
    assert "--at_once: expected bool or null, got some" in capsys.readouterr().err
