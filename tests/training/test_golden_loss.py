"""Twenty losses of a small run, committed: whatever changes the numerics must change tests/golden/losses.json, too.

The numbers hold to 1e-5 on every version of Python and jax that the project supports. Who changes them says why in
the commit, because a change that is meant to be neutral (a refactoring, another kernel, another sharding) never does.
The text below and its tokens, which are its bytes, belong to the golden numbers as well.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from cpmjax.data.batches import Batches, Rows
from cpmjax.data.mixture import Mixture, Segment
from cpmjax.data.tokens import Split
from cpmjax.parallel.mesh import make_mesh
from cpmjax.run.config import ComputeConfig, Config, DataConfig, ModelConfig, RunConfig, TrainingConfig
from cpmjax.run.schedule import WSD
from cpmjax.training.optimizer import make_optimizer
from cpmjax.training.origin import Origin
from cpmjax.training.state import abstract_state, create_state
from cpmjax.training.step import make_step, next_token_loss
from cpmjax.training.timeline import Timeline

FILE = Path(__file__).parents[1] / "golden" / "losses.json"

TEXT = """
A lighthouse keeper wrote down the weather every evening, and every morning he read what he had written the day before.
After some years he noticed that the book had begun to know the weather better than the sky did.

Small models are trained for the same reason that boats are built first as toys: the water is the same.
What floats in a tub may still sink at sea, but what sinks in a tub will not float anywhere.

def average(values):
    total, count = 0.0, 0
    for value in values:
        total, count = total + value, count + 1
    return total / count if count else 0.0

The baker counts loaves, the miller counts sacks, the farmer counts rainy days; none of them is wrong,
and each of them thinks that the other two have chosen a strange thing to count.

class Tide:
    def __init__(self, height, period):
        self.height = height
        self.period = period

    def at(self, hour):
        return self.height * (1 if hour % self.period < self.period / 2 else -1)

When the rate is high the water is rough and the boat travels far; when the rate falls the water grows still,
and only then can one see how deep the boat has come to lie. Nobody travels far on still water,
and nobody reads the depth in a storm. So first the one, and then the other.

for name in sorted(harbours, key=lambda harbour: harbour.distance):
    if name.depth >= needed and not name.closed:
        return name
raise LookupError("no harbour is deep enough: wait for the tide")

The clock in the tower struck thirteen once. The mayor had it mended, the priest wrote it down,
and the children, who had heard it best, came back the next day at one to hear whether it would do so again.
"""

CONFIG = Config(
    run=RunConfig(seed=11),
    model=ModelConfig(vocabulary=256, width=32, layers=2, heads=4, kv_heads=2, feed_forward=48, dim_model_base=16),
    compute=ComputeConfig(loss_chunk=64),
    data=DataConfig(sequence_length=32, stable={"text": 1.0}),
    schedule=WSD(warmup=3, stable=11, decay=6),
    training=TrainingConfig(batch_size=4, accumulation=2, z_loss=1e-4),
)


def batches() -> Batches:
    """Every paragraph is a document, every byte a token: no tokenizer is trained here, so none can change."""
    documents = [np.frombuffer(paragraph.encode(), np.uint8) for paragraph in TEXT.strip().split("\n\n")]
    offsets = np.cumsum([0, *map(len, documents)]).astype(np.int64)
    rows = Rows(Split("text (train)", np.concatenate(documents), offsets), CONFIG.data.sequence_length, CONFIG.run.seed)
    return Batches(Mixture([Segment(None, CONFIG.data.stable)], CONFIG.run.seed), {"text": rows})


def losses() -> list[float]:
    timeline, read, found = Timeline(CONFIG, Origin({})), batches(), []
    optimizer = make_optimizer(CONFIG.model, CONFIG.optimizer)
    loss = next_token_loss(CONFIG.model, CONFIG.compute, CONFIG.training.z_loss)
    step = jax.jit(make_step(CONFIG.model, loss, optimizer, CONFIG.training.accumulation))
    mesh = make_mesh(CONFIG.mesh, jax.devices()[:1])
    state = create_state(CONFIG.model, optimizer, abstract_state(CONFIG.model, optimizer, mesh), CONFIG.run.seed)
    for number in range(1, timeline.total + 1):
        rows = read(timeline.position(number - 1), CONFIG.training.batch_size)
        state, metrics = step(state, rows, timeline.rates(number))
        found.append(float(metrics["loss"]))
    return found


@pytest.mark.smoke
def test_the_losses_are_the_committed_ones():
    found, golden = losses(), json.loads(FILE.read_text())["losses"]
    assert golden[0] == pytest.approx(np.log(256), abs=0.5)  # the first guess is nearly even
    assert golden[-1] < golden[0] - 1.5
    np.testing.assert_allclose(found, golden, rtol=0, atol=1e-5)
