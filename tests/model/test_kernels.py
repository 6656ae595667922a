"""Kernels and ring against plain attention, which of them runs where, and what they keep and send."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import on_eight_devices
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from cpmjax.model import kernels, ring
from cpmjax.model.attention import attend_rows, plain
from cpmjax.model.dispatch import attention
from cpmjax.model.initialise import initialise
from cpmjax.model.transformer import MiniCPM
from cpmjax.parallel.costs import costs
from cpmjax.parallel.mesh import AXES, make_mesh
from cpmjax.parallel.topologies import topology
from cpmjax.run.config import ComputeConfig, Config, DataConfig, MeshConfig, ModelConfig, TrainingConfig
from cpmjax.run.errors import UserError
from cpmjax.training.optimizer import make_optimizer
from cpmjax.training.state import abstract_state
from cpmjax.training.step import Rates, abstract_batch, batch_sharding, make_step, next_token_loss

H = 4
MODEL = ModelConfig(vocabulary=64, width=32, layers=2, heads=H, kv_heads=2, feed_forward=48, dim_model_base=16)
IMPLEMENTATIONS = {
    "chunked": attend_rows,
    "splash": partial(kernels.splash, interpret=True),
    "triton": partial(kernels.triton, interpret=True),
    "cudnn": kernels.cudnn,
}


def rows(length, groups, width, dtype=np.float32):
    """-> (query, key, value, segments) of two rows: two documents, and two with padding behind them."""
    draw = np.random.default_rng(0)
    shapes = [(2, length, heads, width) for heads in (H, groups, groups)]
    segments = np.ones((2, length), np.int32)
    segments[0, length // 3 :] = 2
    segments[1, length // 2 :] = 2
    segments[1, length - length // 8 :] = 0
    return *(jnp.asarray(draw.normal(size=shape), dtype) for shape in shapes), jnp.asarray(segments)


def mixed_and_gradients(attend, query, key, value, segments):
    """What real tokens mixed, and the gradients of what they draw."""
    real = (segments > 0)[..., None, None]
    weight = jax.random.normal(jax.random.key(1), query.shape) * real

    def weighted(*inputs):
        mixed = attend(*inputs, segments).astype(jnp.float32)
        return jnp.sum(mixed * weight), mixed * real

    (_, mixed), gradients = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1, 2), has_aux=True))(query, key, value)
    return mixed, *(gradient.astype(jnp.float32) for gradient in gradients)


def assert_as_plain(attend, inputs, tolerance=1e-5):
    exact = [x.astype(jnp.float32) for x in inputs[:3]]
    found, expected = mixed_and_gradients(attend, *inputs), mixed_and_gradients(plain, *exact, inputs[3])
    for part, expected_part in zip(found, expected, strict=True):
        np.testing.assert_allclose(part, expected_part, rtol=tolerance, atol=tolerance)


# Lengths that no block divides: of one block, and of three.
@pytest.mark.parametrize("length, groups", [(37, 2), (37, H), (261, 2)])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_every_implementation_against_the_plain_one(name, length, groups, monkeypatch):
    monkeypatch.setattr(kernels, "_SPLASH_BLOCK", 128)
    if name != "cudnn":
        return assert_as_plain(IMPLEMENTATIONS[name], rows(length, groups, 8))
    if jax.default_backend() != "gpu":
        pytest.skip("cuDNN runs, and lowers, only where there is a GPU")
    assert_as_plain(IMPLEMENTATIONS[name], rows(length, groups, 64, jnp.bfloat16), tolerance=3e-2)


def on(platform, **axes):
    """A mesh of devices that are not there."""
    device = AbstractDevice(
        device_kind="NVIDIA H100" if platform == "gpu" else platform, num_cores=None, platform=platform
    )
    sizes = tuple(axes.get(axis, 1) for axis in AXES)
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), abstract_device=device)


@pytest.mark.parametrize("width", [64, 80])
def test_triton_lowers_for_a_gpu_that_is_not_there(width):
    inputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in rows(261, 2, width, jnp.bfloat16)]
    with jax.sharding.use_abstract_mesh(on("gpu")):
        traced = jax.jit(partial(mixed_and_gradients, kernels.triton)).trace(*inputs)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "mha_forward" in text and "mha_backward" in text


# ---- the choice ------------------------------------------------------------------------------------------------------


KERNEL = {"mha_forward": "triton", "splash_mha_fwd": "splash", "ppermute": "ring", "dot_product_attention_fwd": "cudnn"}


def chosen(choice, mesh, inputs):
    with jax.sharding.use_abstract_mesh(mesh):
        program = str(jax.make_jaxpr(partial(attention, choice))(*inputs))
    return {kernel for mark, kernel in KERNEL.items() if mark in program}


@pytest.mark.parametrize(
    "platform, axes, dtype, kernel",
    [
        ("cpu", {}, jnp.bfloat16, set()),
        ("cpu", {"fsdp": 2, "tensor": 2}, jnp.float32, set()),
        ("tpu", {}, jnp.float32, {"splash"}),
        ("tpu", {"data": 2, "tensor": 4}, jnp.bfloat16, {"splash"}),  # more parts than key-value heads
        ("tpu", {"tensor": 8}, jnp.bfloat16, set()),  # which do not divide the heads
        ("tpu", {"fsdp": 4}, jnp.bfloat16, set()),  # nor these the rows
        ("gpu", {"tensor": 2}, jnp.bfloat16, {"triton"}),
        ("gpu", {}, jnp.float32, set()),
        *((platform, {"tensor": 2, "sequence": 2}, jnp.bfloat16, {"ring"}) for platform in ("cpu", "gpu", "tpu")),
        ("cpu", {"sequence": 5}, jnp.bfloat16, set()),
    ],
)
def test_auto_goes_by_platform_mesh_and_type(platform, axes, dtype, kernel):
    assert chosen("auto", on(platform, **axes), rows(32, 2, 8, dtype)) == kernel


@pytest.mark.parametrize(
    "choice, platform, axes, message",
    [
        ("splash", "cpu", {}, "splash: the devices are of platform cpu, expected tpu, or auto, chunked or plain"),
        ("triton", "tpu", {}, "triton: the devices are of platform tpu, expected gpu"),
        ("cudnn", "gpu", {}, "cudnn: float32 heads of width 8, expected bfloat16 and a multiple of 8 up to 128"),
        ("splash", "tpu", {"sequence": 2}, "splash: it takes whole rows, expected mesh.sequence = 1, not 2"),
        ("splash", "tpu", {"tensor": 8}, "splash: 4 heads, expected a multiple of mesh tensor = 8"),
        ("triton", "gpu", {"data": 2, "fsdp": 2}, "triton: 2 rows, expected a multiple of mesh data x fsdp = 4"),
    ],
)
def test_an_impossible_choice_is_one_line(choice, platform, axes, message):
    with pytest.raises(UserError, match=f"compute.attention = {message}"):
        chosen(choice, on(platform, **axes), rows(32, 2, 8))


def test_without_a_mesh_it_is_the_platform_of_jax():
    with pytest.raises(UserError, match=f"platform {jax.default_backend()}, expected"):
        attention("triton" if jax.default_backend() == "tpu" else "splash", *rows(32, 2, 8))


def test_a_model_takes_the_attention_of_its_configuration():
    parameters, tokens = initialise(MODEL, jax.random.key(0)), jnp.arange(24).reshape(2, 12)
    with pytest.raises(UserError, match=r"compute\.attention = cudnn"):
        MiniCPM(MODEL, parameters, ComputeConfig(attention="cudnn"))(tokens)
    expected = MiniCPM(MODEL, parameters, ComputeConfig(attention="plain"))(tokens)
    np.testing.assert_allclose(MiniCPM(MODEL, parameters)(tokens), expected, atol=1e-5)


def test_a_jax_without_the_kernel(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert chosen("auto", on("gpu"), rows(32, 2, 8, jnp.bfloat16)) == set()
    with pytest.raises(UserError, match=r"triton: jax [\d.]+ lacks it"):
        chosen("triton", on("gpu"), rows(32, 2, 8))


# ---- what is kept for the backward pass ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mesh, platform, mark",
    [
        (on("gpu"), "cuda", "mha_forward"),
        (on("tpu", tensor=2), "tpu", "splash_mha_fwd"),
        (on("cpu", sequence=2), "cpu", "collective_permute"),
    ],
)
def test_what_is_kept_keeps_a_kernel_from_running_twice(mesh, platform, mark):
    """For the gradient, with `dots`; with `block`, which keeps nothing, it does run twice."""
    parameters = jax.eval_shape(partial(initialise, MODEL), jax.random.key(0))
    tokens = jnp.zeros((2, 32), jnp.int32)

    def times(remat):
        def loss(parameters):
            model = MiniCPM(MODEL, parameters, ComputeConfig("bfloat16", remat))
            return jnp.sum(model.trunk(model.embed(tokens), tokens, tokens)[0])

        with jax.sharding.use_abstract_mesh(mesh):
            return jax.jit(jax.grad(loss)).trace(parameters).lower(lowering_platforms=(platform,)).as_text().count(mark)

    assert times("block") > times("dots") == times("none") > 0


# ---- rows split over devices -----------------------------------------------------------------------------------------

# Dynamic rotary scaling, and rows longer than the context: all devices must know how long a row is.
LONG = replace(MODEL, context=32, rope_theta=1e6, rope_scaling="dynamic", rope_factor=4.0)


def step_on(mesh, length, model=LONG, batch=2, compute=ComputeConfig(loss_chunk=32)):
    """-> (abstract state, abstract batch, the compiled training step)."""
    config = Config(
        model=model,
        compute=compute,
        data=DataConfig(sequence_length=length),
        training=TrainingConfig(batch_size=batch),
    )
    optimizer = make_optimizer(model, config.optimizer)
    with jax.set_mesh(mesh):
        state = abstract_state(model, optimizer, mesh)
        shardings = jax.tree.map(lambda x: x.sharding, state)
        step = make_step(model, next_token_loss(model, compute, 0.0), optimizer, accumulation=1)
        rows = abstract_batch(config, batch_sharding(mesh, config))
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
        return state, rows, jitted.lower(state, rows, Rates(np.float32(0.01), np.float32(0.001))).compile()


def check_ring() -> None:
    """Every mesh against plain, in chunks that do and do not divide a device's part, and in one."""
    for sizes, chunk in (((1, 1, 1, 8), 512), ((1, 2, 1, 4), 4), ((1, 2, 2, 2), 5), ((1, 1, 4, 2), 7)):
        ring.CHUNK = chunk
        for groups in (2, H):
            inputs = rows(40, groups, 8)
            with jax.set_mesh(make_mesh(MeshConfig(*sizes))):
                assert_as_plain(partial(attention, "auto"), inputs)


def check_long_rows() -> None:
    """The loss and its gradient at four times the context: one device, and rows split over two and eight."""
    length, found = 4 * LONG.context, []
    parameters = initialise(LONG, jax.random.key(0))
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, LONG.vocabulary, (2, length)).astype(np.int32)
    segments = np.array(rows(length, 2, 8)[3])
    positions = np.arange(length, dtype=np.int32) - np.where(segments == 2, (segments == 1).sum(1, keepdims=True), 0)
    positions[0], segments[0] = np.arange(length), 1  # one document of the whole length
    batch = {"tokens": tokens, "targets": np.roll(tokens, -1, 1), "positions": positions, "segments": segments}
    batch["weights"] = (segments > 0).astype(np.float32)
    loss = next_token_loss(LONG, ComputeConfig(loss_chunk=32), 0.0)
    for sizes in ((1, 1, 1, 1), (1, 2, 2, 2), (1, 1, 1, 8)):
        mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
        with jax.set_mesh(mesh):
            (value, _), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(parameters, batch)
        weight = batch["weights"].sum()
        found.append((np.asarray(value) / weight, *(np.asarray(x) / weight for x in jax.tree.leaves(gradients))))
    for other in found[1:]:
        for part, expected in zip(other, found[0], strict=True):
            np.testing.assert_allclose(part, expected, rtol=0, atol=1e-5)


def check_what_is_sent_and_kept() -> None:
    """A training step with rows split over eight devices: keys go around, nothing of a whole row comes together (what
    is gathered are targets and parameters at most), and memory grows as rows do."""
    mesh = make_mesh(MeshConfig(data=1, sequence=8))
    around, temporaries = [], []
    for length in (4096, 8192, 16384):
        program = step_on(mesh, length, batch=1, compute=ComputeConfig(loss_chunk=length))[2]
        temporaries.append(program.memory_analysis().temp_size_in_bytes)
        sent = {(each.kind, each.axes): each for each in costs(program, mesh).collectives}
        assert set(sent) == {("collective-permute", ("sequence",)), ("all-reduce", ("sequence",))}, sent
        around.append(sent["collective-permute", ("sequence",)].sent)
    assert around[2] == pytest.approx(2 * around[1], rel=0.1)
    first, second, third = temporaries
    assert third - second < 2.2 * (second - first), temporaries


@pytest.mark.slow
@pytest.mark.parametrize("check", ["check_ring", "check_long_rows", "check_what_is_sent_and_kept"])
def test_rows_split_over_eight_devices(check):
    on_eight_devices(__file__, f"{check}()")


# ---- a TPU that is not there -----------------------------------------------------------------------------------------


def check_splash_in_a_step() -> None:
    """A training step for four chips of TPU v5e: forward once, and two kernels for the gradients."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), topology("v5e:2x2").devices)
    program = step_on(mesh, 300, replace(MODEL, head_width=64), compute=ComputeConfig("bfloat16"))[2]
    assert program.as_text().count('custom_call_target="tpu_custom_call"') == 3
    # Rows and heads are where they are computed: of activations nothing is gathered.
    gathered = [each for each in costs(program, mesh).collectives if each.kind == "all-gather"]
    assert {each.axes for each in gathered} == {("fsdp",)}, gathered


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the package libtpu")
def test_splash_compiles_for_a_tpu():
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"} | {
        "PYTHONPATH": os.pathsep.join(map(str, (*Path(__file__).parents[1:3], Path(__file__).parent))),
    }
    command = [sys.executable, "-c", "import test_kernels; test_kernels.check_splash_in_a_step()"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
