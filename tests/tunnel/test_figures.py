"""The figures of a study: pictures are written whole, whatever the table holds; what is beyond its bar is marked."""

from __future__ import annotations

import numpy as np
from matplotlib import image
from tunnel_jobs import RATES, falling, made_up_coordinates, made_up_losses

from cpmjax.tunnel import coordinate_check, figures, transfer
from cpmjax.tunnel.coordinate_figures import coordinates
from cpmjax.tunnel.transfer_figures import curves

MARK = np.array([0xFD, 0xE2, 0xE0]) / 255


def marked(path) -> float:
    """Share of a picture that has the colour of a panel beyond its bar."""
    pixels = image.imread(path)[..., :3]
    return float((np.abs(pixels - MARK).max(axis=-1) < 0.01).mean())


def draw(path, table, axis="width"):
    figures.save(coordinates(table, coordinate_check.slopes(table), axis), path)
    return marked(path)


def test_a_panel_beyond_its_bar_is_shaded(tmp_path):
    good, bad = made_up_coordinates(0.0), made_up_coordinates(1.0, name="standard")
    assert draw(tmp_path / "good.png", good) == 0
    # One of the panels of one of two rows: the last layer of attention.
    assert 0.02 < draw(tmp_path / "both.png", good + bad) < 0.2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both.png", "good.png"]


def test_over_layers_only_what_leaves_the_stack_is_shaded(tmp_path):
    assert draw(tmp_path / "a.png", made_up_coordinates(1.0, axis="layers"), "layers") == 0
    assert draw(tmp_path / "b.png", made_up_coordinates(1.0, "logits", axis="layers"), "layers") > 0.02


def test_coordinates_of_a_trial_that_diverged(tmp_path):
    table = made_up_coordinates(0.0)
    lost = [row for row in table if row["width"] == 16 and row["seed"] == 1 and row["step"] == 10]
    rest = [row | {"status": "diverged"} if row["width"] == 16 and row["seed"] == 1 else row
            for row in table if row not in lost]  # fmt: skip
    assert draw(tmp_path / "figure.png", rest) > 0.2  # nothing passes with a trial missing: all panels


def test_transfer_with_one_family_many_and_diverged_rates(tmp_path):
    table = made_up_losses(lambda width: 0.01, falling, diverged={(256, rate) for rate in RATES if rate > 0.05})
    for count, names in enumerate((["minicpm"], ["minicpm", "standard", "depth_mup", "completep"])):
        families = transfer.families([row | {"parametrisation": name} for name in names for row in table])
        figures.save(curves(families), tmp_path / f"{count}.png")
    one, four = (image.imread(tmp_path / f"{count}.png").shape for count in (0, 1))
    assert four[0] > 1.5 * one[0] and four[1] > 2 * one[1]  # two rows of three panels


def test_transfer_of_trials_that_all_diverged(tmp_path):
    broken = {(width, rate) for width in (32, 64, 128, 256) for rate in RATES}
    families = transfer.families(made_up_losses(lambda width: 0.01, falling, diverged=broken))
    figures.save(curves(families), tmp_path / "figure.png")
    assert image.imread(tmp_path / "figure.png").size > 0
