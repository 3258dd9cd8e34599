"""The shapes that losses of arrays in parallel insist on, checked while tracing."""

import jax


def require_same_shape(**arrays: jax.Array | None) -> None:
    """Raises ValueError unless all arrays given have one shape: [M] against [M, 1]
    would broadcast to [M, M]."""
    shapes = {name: x.shape for name, x in arrays.items() if x is not None}
    if len(set(shapes.values())) > 1:
        raise ValueError(
            "expected arrays of one shape, got "
            + ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        )
