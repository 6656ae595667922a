"""Costs of programs whose products and collectives are known from how they were written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpmjax.parallel.costs import Collective, costs, read
from cpmjax.parallel.device_groups import axes_of, replica_groups
from cpmjax.parallel.mesh import make_mesh
from cpmjax.run.config import ComputeConfig, Config, DataConfig, MeshConfig, ModelConfig, TrainingConfig
from cpmjax.run.errors import UserError
from cpmjax.run.optimizers import AdamW
from cpmjax.training.optimizer import make_optimizer
from cpmjax.training.state import abstract_state
from cpmjax.training.step import Rates, abstract_batch, batch_sharding, make_step, next_token_loss

N = 16
PRODUCT = 2 * N**3
MATRIX = jax.ShapeDtypeStruct((N, N), jnp.float32)


def text_of(function, *arguments) -> str:
    return jax.jit(function).lower(*arguments).compile().as_text()


def flops(function, *arguments) -> int:
    return read(text_of(function, *arguments), {}).flops


def repeated(times: int, function, x: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda carry, _: (function(carry), None), x, length=times)[0]


def test_a_loop_in_a_loop_and_the_costlier_branch():
    def program(x, y):
        def inner(z):
            return jnp.sin(z @ y)

        x = repeated(3, lambda z: jnp.cos(repeated(5, inner, z) @ y), x)
        return jax.lax.cond(x[0, 0] > 0, lambda z: inner(inner(z)), inner, x)

    assert flops(program, MATRIX, MATRIX) == (3 * (5 + 1) + 2) * PRODUCT


def test_batched_products_outer_products_and_convolutions():
    batch = jax.ShapeDtypeStruct((3, 5, 7), jnp.float32)
    assert flops(lambda a, b: jnp.einsum("bij,bkj->bik", a, b), batch, batch) == 2 * 3 * 5 * 5 * 7
    # Of 10 places, 3 wide, padded at both ends: 8 inner ones meet 3 numbers and 2 outer ones 2.
    image, kernel = jnp.ones((2, 4, 10)), jnp.ones((6, 4, 3))
    convolve = lambda x, w: jax.lax.conv_general_dilated(x, w, (1,), "SAME")  # noqa: E731
    assert flops(convolve, image, kernel) == 2 * 2 * 6 * 4 * (8 * 3 + 2 * 2)


def test_a_count_that_the_compiler_did_not_note_is_read_from_the_loop():
    text = text_of(lambda x, y: repeated(7, lambda z: jnp.sin(z @ y), x), MATRIX, MATRIX)
    noted = '"known_trip_count":{"n":"7"}'
    assert noted in text
    assert read(text.replace(noted, '"noted":"nothing"'), {}).flops == read(text, {}).flops == 7 * PRODUCT


def test_a_loop_of_unknown_length_is_refused_by_name_if_it_costs_anything():
    def until_large(step):
        return lambda x, y: jax.lax.while_loop(lambda z: z[0, 0] < 1e6, lambda z: step(z, y), x)

    with pytest.raises(UserError, match=r"the loop while[.\w]* does not say how often it turns"):
        flops(until_large(lambda z, y: z @ y), MATRIX, MATRIX)
    assert flops(until_large(lambda z, y: z + y), MATRIX, MATRIX) == 0
    assert read(text_of(until_large(lambda z, y: z @ y), MATRIX, MATRIX), {}, turns=3).flops == 3 * PRODUCT


# In the forms of other compilers: a TPU's product of 3 pairs of matrices, a collective that is started and awaited,
# one over groups of one device, a call whose insides nobody knows.
OTHER_FORMS = """HloModule other, is_scheduled=true

ENTRY %main.1 (a.1: bf16[3,16,8], b.1: bf16[3,8,8]) -> bf16[3,16,8] {
  %a.1 = bf16[3,16,8]{2,1,0:T(8,128)(2,1)} parameter(0)
  %b.1 = bf16[3,8,8]{2,1,0:T(8,128)(2,1)} parameter(1)
  %start = (bf16[3,8,8]{2,1,0:T(8,128)(2,1)}, /*index=1*/bf16[12,8,8]{2,1,0}) all-gather-start(%b.1), replica_groups=[2,4]<=[8], dimensions={0}
  %done = bf16[12,8,8]{2,1,0} all-gather-done(%start)
  %alone = bf16[3,8,8]{2,1,0} all-reduce(%b.1), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add
  %call = bf16[3,8,8]{2,1,0} custom-call(%b.1), custom_call_target="tpu_custom_call", backend_config={"a":"(%b"}
  ROOT %product = bf16[3,16,8]{2,1,0} convolution(%a.1, %call), window={size=3 stride=2 lhs_dilate=3}, dim_labels=0bf_0oi->0bf
}
"""  # noqa: E501


def test_forms_of_other_compilers():
    found = read(OTHER_FORMS, {"data": 2, "fsdp": 4})
    assert found.flops == 3 * 2 * 16 * 8 * 8
    assert found.opaque == ("tpu_custom_call",)
    assert found.collectives == (Collective("all-gather", ("fsdp",), 1, 3 * 3 * 8 * 8 * 2),)


# A TPU's compiler names one collective in each fusion of a chain; a kernel it calls by its name.
CHAIN = """HloModule chain

%begins (a.1: bf16[8,8]) -> bf16[16,8] {
  %a.1 = bf16[8,8]{1,0} parameter(0)
  %gather.1 = bf16[16,8]{1,0} all-gather(%a.1), replica_groups={{0,1}}, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %start = bf16[16,8]{1,0} custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%goes_on (a.2: bf16[8,8]) -> bf16[16,8] {
  %a.2 = bf16[8,8]{1,0} parameter(0)
  %gather.2 = bf16[16,8]{1,0} all-gather(%a.2), replica_groups={{0,1}}, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %done = bf16[16,8]{1,0} custom-call(%gather.2), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (a: bf16[8,8], b: s8[1,4,4], q: bf16[2,3,1024,64]) -> bf16[16,8] {
  %a = bf16[8,8]{1,0} parameter(0)
  %b = s8[1,4,4]{2,1,0} parameter(1)
  %q = bf16[2,3,1024,64]{3,2,1,0} parameter(2)
  %splash_mha_fwd_segmented.1 = bf16[2,3,1024,64]{3,2,1,0} custom-call(%b, %b, %q, %q, %q), custom_call_target="tpu_custom_call"
  %one = bf16[16,8]{1,0:T(8,128)S(1)} fusion(%a), kind=kCustom, calls=%begins
  ROOT %two = bf16[16,8]{1,0} fusion(%a), kind=kCustom, calls=%goes_on
}
"""  # noqa: E501


def test_a_chain_counts_once_and_a_kernel_by_the_blocks_that_it_goes_through():
    found = read(CHAIN, {"fsdp": 2})
    assert found.collectives == (Collective("all-gather", ("fsdp",), 1, 8 * 8 * 2),)
    assert found.opaque == ()
    # Scores and what they mix, for 2 rows of 3 heads: of 16 pairs of blocks 10 are not in the future.
    assert found.flops == 2 * (2 * 2 * 3 * 1024 * 1024 * 64) * 10 // 16
    # The kernel's operands and result; of the fusions what is read, and what is written to memory, not to the chip.
    queries = 2 * 3 * 1024 * 64 * 2
    assert found.moved == (2 * 16 + 3 * queries) + queries + 2 * 8 * 8 * 2 + 16 * 8 * 2


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_traffic_of_slices_and_updates_is_theirs_alone():
    stack, row = jax.ShapeDtypeStruct((100, 64), jnp.float32), jax.ShapeDtypeStruct((64,), jnp.float32)

    def update(stack, row, index):
        return jax.lax.dynamic_update_index_in_dim(stack, row + jax.lax.dynamic_index_in_dim(stack, index)[0], index, 0)

    program = jax.jit(update, donate_argnums=0).lower(stack, row, 3).compile()
    assert read(program.as_text(), {}).moved < 10 * 64 * 4 < 100 * 64 * 4


@pytest.mark.parametrize("remat", ["none", "block"])
def test_traffic_is_what_the_compiler_counts_where_there_are_no_loops(remat):
    def moved(unroll: int):
        state, batch, loss, _ = training(ComputeConfig(remat=remat, unroll=unroll), ROWS)
        program = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(state.trainable, batch).compile()
        analysis = program.cost_analysis()
        analysis = analysis[0] if isinstance(analysis, list) else analysis  # of jax 0.10
        return read(program.as_text(), {}).moved, analysis["bytes accessed"]

    unrolled, expected = moved(unroll=3)
    assert unrolled == pytest.approx(expected, rel=0.02)
    scanned, without_turns = moved(unroll=1)
    # Stacks are written and read beside, which a model without loops does not have; without its turns it is too little.
    assert 0.9 * expected < scanned < 1.5 * expected
    assert without_turns < 0.7 * expected


# ---- a training step -------------------------------------------------------------------------------------------------

MODEL = ModelConfig(
    vocabulary=96, width=32, layers=3, heads=4, kv_heads=2, feed_forward=80, dim_model_base=8, tied=False
)
ROWS, LENGTH, CHUNK = 2, 256, 128
TOKENS = ROWS * LENGTH
DOWN = 2 * TOKENS * MODEL.layers * 80 * 32
LAYERS = 2 * TOKENS * MODEL.layers * (32 * 32 + 2 * 32 * 16 + 32 * 32) + 3 * DOWN  # query, key and value, output, ...
HEAD = 2 * TOKENS * 32 * 96
# Each of the two chunks of queries meets the keys up to its own end; mixing values costs the same again.
SCORES = 2 * ROWS * MODEL.layers * MODEL.heads * 8 * (CHUNK * 128 + CHUNK * 256)
FORWARD = LAYERS + HEAD + 2 * SCORES


def training(compute: ComputeConfig, rows: int):
    """-> (abstract state, abstract batch, loss, optimizer) on one device."""
    data = replace(DataConfig(), sequence_length=LENGTH)
    config = Config(model=MODEL, data=data, training=replace(TrainingConfig(), batch_size=rows))
    mesh = make_mesh(MeshConfig())
    optimizer = make_optimizer(MODEL, AdamW())
    batch = abstract_batch(config, batch_sharding(mesh, config))
    return abstract_state(MODEL, optimizer, mesh), batch, next_token_loss(MODEL, compute, 0.0), optimizer


@pytest.mark.parametrize(
    "compute, again",
    [
        (ComputeConfig(remat="none"), {SCORES}),  # attention computes its scores again in any case
        (ComputeConfig(remat="dots"), {SCORES}),
        # The whole block but its last product, which no gradient asks for; then attention its scores, which jax 0.10
        # takes from what was computed again and jax 0.12 does not.
        (ComputeConfig(remat="block"), {LAYERS - DOWN + 2 * SCORES, LAYERS - DOWN + 3 * SCORES}),
        (ComputeConfig(remat="dots", loss_chunk=128), {SCORES + HEAD}),
        # Without a loop between forward and backward jax 0.10 takes the scores it has already, jax 0.12 does not.
        (ComputeConfig(remat="dots", unroll=3), {0, SCORES}),
    ],
)
def test_a_gradient(compute, again):
    """Forward once, backward twice that, and what is computed again."""
    state, batch, loss, _ = training(compute, ROWS)
    program = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(state.trainable, batch).compile()
    assert costs(program, make_mesh(MeshConfig())).flops - 3 * FORWARD in again


def test_a_training_step():
    """Two micro-batches, an optimizer: of products there is nothing but the gradient of each."""
    state, batch, loss, optimizer = training(ComputeConfig(remat="dots"), 2 * ROWS)
    step = make_step(MODEL, loss, optimizer, accumulation=2)
    program = jax.jit(step).lower(state, batch, Rates(np.float32(0.1), np.float32(0.1))).compile()
    found = costs(program, make_mesh(MeshConfig()))
    assert found.flops == 2 * (3 * FORWARD + SCORES)
    assert found.collectives == () and found.opaque == () and found.describe().count("\n") == 0


# ---- collectives -----------------------------------------------------------------------------------------------------


def test_all_forms_of_groups():
    assert replica_groups("replica_groups={{0,1},{2,3}}, x={}", 4) == [(0, 1), (2, 3)]
    assert replica_groups("channel_id=1, replica_groups=[2,4]<=[8]", 8) == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert replica_groups("replica_groups=[4,2]<=[2,4]T(1,0), x=1", 8) == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert replica_groups("replica_groups={}", 3) == [(0, 1, 2)]
    mesh = "replica_groups=mesh['a'=4,'b'=1,'c'=2]"
    assert replica_groups(mesh + " {'c'}, x={'a'}", 8) == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert replica_groups(mesh + ", device_ids=([2,4]T(1,0)) {'a'}, x=1", 8) == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert replica_groups(mesh + " {'a','c'}", 8) == [tuple(range(8))]
    with pytest.raises(UserError, match="expected replica_groups"):
        replica_groups("channel_id=1", 8)


def test_groups_are_those_of_axes():
    mesh = {"data": 2, "fsdp": 2, "tensor": 2, "sequence": 1}
    assert axes_of([(0, 4), (1, 5), (2, 6), (3, 7)], mesh) == ("data",)
    assert axes_of([(1, 0), (2, 3), (4, 5), (7, 6)], mesh) == ("tensor",)
    assert axes_of([(0, 1, 4, 5), (2, 3, 6, 7)], mesh) == ("data", "tensor")
    assert axes_of([tuple(range(8))], mesh) == ("data", "fsdp", "tensor")
    assert axes_of([(0, 3), (1, 2), (4, 7), (5, 6)], mesh) == ()


SHARDED = """
import dataclasses, json
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from cpmjax.parallel.costs import costs

mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def turn(x, _):  # [8, 16] float32 on each device: 512 bytes
    x = jnp.sin(jax.lax.psum(x, "fsdp"))
    x = jnp.sin(jax.lax.all_gather(x, "data", tiled=True))  # [16, 16]
    x = jnp.sin(jax.lax.psum_scatter(x, "fsdp", tiled=True))  # [4, 16]
    x = jnp.sin(jax.lax.all_to_all(x, "fsdp", 1, 0, tiled=True))  # [16, 4]
    x = jnp.sin(jax.lax.ppermute(x, "data", [(0, 1), (1, 0)]))
    return x.reshape(4, 16).repeat(2, axis=0), None


def body(x):
    x = jax.lax.scan(turn, x, length=5)[0]
    return jax.lax.psum(x.sum(), ("data", "fsdp"))[None]


rows = P(("data", "fsdp"))
by_hand = jax.shard_map(body, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
# What a compiler has to find itself: rows of x on data, weights split over fsdp and wanted whole.
product = jax.jit(
    lambda x, w: jnp.sin(jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))) + x,
    in_shardings=(NamedSharding(mesh, P("data")), NamedSharding(mesh, P("fsdp"))),
    out_shardings=NamedSharding(mesh, P("data")),
)
programs = [jax.jit(by_hand).lower(jnp.ones((64, 16))), product.lower(jnp.ones((64, 16)), jnp.ones((64, 16)))]
found = [costs(program.compile(), mesh) for program in programs]
print(json.dumps([dataclasses.asdict(each) for each in found] + [found[0].describe()]))
"""


def test_collectives_of_a_sharded_program():
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    done = subprocess.run([sys.executable, "-c", SHARDED], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    by_hand, found, described = json.loads(done.stdout)
    assert by_hand["flops"] == 0
    sent = {(each["kind"], *each["axes"]): (each["count"], each["sent"]) for each in by_hand["collectives"]}
    assert sent == {
        ("all-reduce", "fsdp"): (5, 5 * 2 * 3 / 4 * 512),
        ("all-gather", "data"): (5, 5 * 512),
        ("reduce-scatter", "fsdp"): (5, 5 * 3 / 4 * 1024),
        ("all-to-all", "fsdp"): (5, 5 * 3 / 4 * 256),
        ("collective-permute", "data"): (5, 5 * 256),
        ("all-reduce", "data", "fsdp"): (1, 2 * 7 / 8 * 4),
    }
    assert "fsdp all-reduce 0.00366 MiB in 5" in described.splitlines()[1]
    (gather,) = found["collectives"]
    assert (gather["kind"], gather["axes"], gather["count"]) == ("all-gather", ["fsdp"], 1)
    assert gather["sent"] == 3 * 64 * 16 * 4 / 4
