"""Arrays that a loss reads in parallel have one shape."""

import jax.numpy as jnp
import pytest

from rlhf_jax.losses.shapes import require_same_shape


def test_the_check_names_the_arrays():
    require_same_shape(a=jnp.zeros(3), b=jnp.ones(3), c=None)
    with pytest.raises(ValueError, match=r"one shape, got a \(3,\), b \(3, 1\)"):
        require_same_shape(a=jnp.zeros(3), b=jnp.ones((3, 1)))
