"""Ways to compile less in tests that run whole programs."""

import contextlib
import functools

import jax
import pytest

from rlhf_jax.programs import runs, scorer


@contextlib.contextmanager
def compiled_once(folder):
    """What several runs have in common is compiled once and kept in a folder."""
    from jax.experimental.compilation_cache import compilation_cache

    wanted = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: jax.config.values[name] for name in wanted}

    def use(values):
        compilation_cache.reset_cache()
        for name, value in values.items():
            jax.config.update(name, value)

    use(wanted)
    yield
    use(before)


@contextlib.contextmanager
def alone():
    """Programs see one device: their compilations take half the time."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (runs, scorer):
            make_mesh = functools.partial(module.make_mesh, devices=jax.devices()[:1])
            patch.setattr(module, "make_mesh", make_mesh)
        yield
