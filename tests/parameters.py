"""Parameters with every leaf random, made without compiling an initialisation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models.llama import init_llama


def random_parameters(model, seed=0):
    """Of a Llama: norms are not 1, biases and lora_b are not 0."""
    shapes = jax.eval_shape(functools.partial(init_llama, model), jax.random.key(0))
    rng = np.random.default_rng(seed)
    spread = model.config.hidden_size**-0.5

    def leaf(path, shape):
        middle = float(path[-1].key == "scale")
        return jnp.array(rng.normal(middle, spread, shape.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes)
