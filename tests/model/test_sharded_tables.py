"""Embedding and head on eight simulated devices: what one device computes, and no more traffic than that needs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from devices import on_eight_devices
from jax.sharding import NamedSharding

from cpmjax.model.initialise import initialise
from cpmjax.model.lookup import look_up
from cpmjax.model.loss import token_losses
from cpmjax.model.transformer import MiniCPM
from cpmjax.parallel.costs import costs
from cpmjax.parallel.mesh import make_mesh
from cpmjax.parallel.sharding import partition
from cpmjax.run.config import ComputeConfig, MeshConfig, ModelConfig

MODEL = ModelConfig(vocabulary=512, width=16, layers=1, heads=2, feed_forward=32, dim_model_base=16)
ROWS, LENGTH = 8, 32
MESHES = (MeshConfig(data=1, fsdp=8), MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=1, fsdp=4, sequence=2))


def placed(mesh, array, *axes):
    return jax.device_put(array, NamedSharding(mesh, partition(axes)))


def tokens(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, MODEL.vocabulary, (ROWS, LENGTH)).astype(np.int32)


def check_lookup() -> None:
    """Runs in a process with eight simulated devices."""
    table, weights = np.random.default_rng(0).normal(size=(2, MODEL.vocabulary, MODEL.width)).astype(np.float32)

    def loss(table, tokens):
        return jnp.sum(look_up(table, tokens) * jnp.sin(look_up(weights, tokens)))

    expected = jax.value_and_grad(loss)(table, tokens(1))
    for config in MESHES:
        mesh = make_mesh(config)
        with jax.set_mesh(mesh):
            gradient = jax.jit(
                jax.value_and_grad(loss), out_shardings=(None, NamedSharding(mesh, partition(("vocabulary", "width"))))
            )
            arguments = placed(mesh, table, "vocabulary", "width"), placed(mesh, tokens(1), "rows", "length")
            found = gradient(*arguments)
            program = gradient.lower(*arguments).compile()
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
        np.testing.assert_allclose(found[1], expected[1], rtol=1e-5, atol=1e-5)
        if config.tensor == config.data == 1:
            # The gradient of the table is summed over nothing but what does not split it; forward and backward send
            # parts of activations, of which a whole table of this size is many times one.
            sent = [each for each in costs(program, mesh).collectives if each.axes == ("fsdp",)]
            assert sum(each.sent for each in sent) < 4 * ROWS * LENGTH * MODEL.width * 4 / config.fsdp
            assert program.memory_analysis().temp_size_in_bytes < table.nbytes


def check_loss() -> None:
    """Runs in a process with eight simulated devices."""
    parameters = initialise(MODEL, jax.random.key(0))
    hidden = np.random.default_rng(2).normal(size=(ROWS, LENGTH, MODEL.width)).astype(np.float32)

    def gradient(chunk: int):
        def loss(embedding, hidden, targets):
            model = MiniCPM(MODEL, parameters | {"embedding": embedding}, ComputeConfig(loss_chunk=chunk))
            losses = token_losses(model, hidden, targets)
            return jnp.sum(losses.loss * losses.logsumexp), losses.logit_rms

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)

    expected = jax.jit(gradient(4096))(parameters["embedding"], hidden, tokens(3))
    for config in MESHES:
        mesh, sent = make_mesh(config), []
        with jax.set_mesh(mesh):
            arguments = (
                placed(mesh, parameters["embedding"], "vocabulary", "width"),
                placed(mesh, hidden, "rows", "length", None),
                placed(mesh, tokens(3), "rows", "length"),
            )
            for chunk in (4096, 4):  # one chunk; as many as a device has positions
                program = jax.jit(gradient(chunk)).lower(*arguments).compile()
                for a, b in zip(jax.tree.leaves(program(*arguments)), jax.tree.leaves(expected), strict=True):
                    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
                collectives = costs(program, mesh).collectives
                sent.append(sum(each.sent for each in collectives if "tensor" not in each.axes))
            # In bfloat16 XLA's CPU compiler aborts on some sums that it takes in float32.
            table, hidden_16, targets = arguments[0], arguments[1].astype(jnp.bfloat16), arguments[2]
            rounded = jax.jit(gradient(4))(table, hidden_16, targets)
        np.testing.assert_allclose(rounded[0][0], expected[0][0], rtol=2e-2)
        assert sent[1] <= 1.01 * sent[0], config


def test_eight_devices_agree_with_one_and_send_no_table_for_a_chunk():
    on_eight_devices(__file__, "check_lookup()", optimised=True)
    on_eight_devices(__file__, "check_loss()", optimised=True)
