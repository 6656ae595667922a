"""The coordinate check with every optimizer but AdamW, each at the rate that it has by default."""

from __future__ import annotations

import pytest
import tunnel_jobs

from cpmjax.run.optimizers import OptimizerConfig
from cpmjax.tunnel import coordinate_check as check
from cpmjax.tunnel.sizes import Axis


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(set(OptimizerConfig.get_known_choices()) - {"adamw"}))
def test_minicpm_passes_with_each_optimizer_at_its_own_rate_and_faults_do_not(tmp_path_factory, kind):
    faults = ("no_matrix_rate", "no_matrix_init", "no_logit_scale", "slow_embedding")
    config = tunnel_jobs.family(tmp_path_factory, f"--optimizer.type={kind}")
    assert config.optimizer == OptimizerConfig.get_known_choices()[kind]()
    width = Axis("width", (64, 128, 256, 512))
    planned = check.make_trials(config, [width], ["minicpm"], seeds=2)
    # What faults do is no matter of a seed, nor of the largest model.
    planned += check.make_trials(config, [Axis("width", width.values[:-1])], faults, seeds=1)
    slopes = tunnel_jobs.slopes_of(config, planned, tmp_path_factory.mktemp(kind))
    verdicts = check.verdicts(slopes, "minicpm", ["width"])
    assert len(verdicts) == 2 and all(verdict.passed for verdict in verdicts), verdicts
    for name in faults:
        assert not all(verdict.passed for verdict in check.verdicts(slopes, name, ["width"])), name
