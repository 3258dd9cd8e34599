"""What every test runs under: 8 CPU devices, no network, strict ranks, checked shapes.

The environment is set before jax is imported anywhere. Tests that need outside data or
weights take the fixture `test_data`, which skips with a reason where there is none.
"""

import os
import tempfile

NUM_DEVICES = 8

_flags = os.environ.get("XLA_FLAGS", "").split()
_flags.append(f"--xla_force_host_platform_device_count={NUM_DEVICES}")
_flags.append("--xla_cpu_use_fusion_emitters=false")  # compiles a third faster
if "PYTEST_XDIST_WORKER" in os.environ:
    # One process a core already: more threads would only wait for each other.
    _flags.append("--xla_cpu_multi_thread_eigen=false")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["XLA_FLAGS"] = " ".join(_flags)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("MPLCONFIGDIR", tempfile.gettempdir())

import pathlib  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
# The tests compile far more than they compute.
jax.config.update("jax_disable_most_optimizations", True)

# The hook breaks pytree dataclasses: it goes on files of pure array functions alone.
install_import_hook(
    ["rlhf_jax.losses", "rlhf_jax.rl", "rlhf_jax.sampling"], "beartype.beartype"
)


@pytest.fixture(scope="session")
def test_data() -> pathlib.Path:
    """The directory that RLHF_JAX_TEST_DATA names; skips the test where it is unset."""
    path = os.environ.get("RLHF_JAX_TEST_DATA")
    if not path:
        pytest.skip("RLHF_JAX_TEST_DATA is not set: no outside data or weights")
    directory = pathlib.Path(path)
    if not directory.is_dir():
        pytest.fail(f"RLHF_JAX_TEST_DATA {path!r}: no such directory")
    return directory
