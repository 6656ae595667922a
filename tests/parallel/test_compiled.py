"""Memory of programs small enough to be counted by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cpmjax.parallel import compiled

SIZE = 512
BYTES = SIZE * SIZE * 4
MATRIX = jax.ShapeDtypeStruct((SIZE, SIZE), jnp.float32)


def test_a_product_of_two_matrices():
    """Two matrices in, one out, one in between, because a product cannot be written over what it reads."""
    program = jax.jit(lambda a, b: (a @ b) @ b).lower(MATRIX, MATRIX).compile()
    used = compiled.memory(program)
    assert used.arguments == 2 * BYTES
    assert used.outputs == BYTES
    assert BYTES <= used.temporaries < 4 * BYTES
    assert used.total == used.arguments + used.temporaries + used.outputs


def test_a_donated_argument_is_not_counted_twice():
    def update(state, change):
        return state + change

    plain = compiled.memory(jax.jit(update).lower(MATRIX, MATRIX).compile())
    donated = compiled.memory(jax.jit(update, donate_argnums=0).lower(MATRIX, MATRIX).compile())
    assert (plain.arguments, plain.outputs) == (2 * BYTES, BYTES)
    assert (donated.arguments, donated.outputs) == (2 * BYTES, 0)


def test_the_line_says_when_it_does_not_fit():
    used = compiled.Memory(arguments=3 * 2**20, temporaries=2 * 2**20, outputs=2**20)
    line = compiled.describe(used, None)
    assert "6 MiB (arguments 3 MiB, temporaries 2 MiB, outputs 1 MiB)" in line and "FIT" not in line
    assert compiled.describe(used, 6 * 2**20) == line
    assert compiled.describe(used, 5 * 2**20).endswith("DOES NOT FIT the device's 5 MiB")
