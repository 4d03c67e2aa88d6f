"""What is on the pictures of `plot`, `paper` and the demo: curves named, paths in order, titles that differ."""

import json

import pytest

from reproduction.drawing import bands, make_figure
from tests._cli import run
from trl_apa.commands import plot
from trl_apa.commands.plot import HELD_OUT, Run
from trl_apa.demo.curves import make_figure as make_demo_figure


# Back and forth in KL, so that an order by KL would be another.
ONLINE = Run("apa", [(4, 0.5, 0.25), (8, 1.0, 2.0), (12, 1.5, 1.0)], [(4, 0.75, 0.5), (12, 1.25, 1.5)])
OFFLINE = Run("awr", [], [(20, 0.25, 0.5), (40, 0.5, 0.25)])


def legend_of(figure):
    """Label to colour and marker."""
    (legend,) = figure.legends
    handles = legend.legend_handles
    return {
        text.get_text(): (handle.get_color(), handle.get_marker())
        for text, handle in zip(legend.texts, handles, strict=True)
    }


@pytest.mark.parametrize("name", plot.FIGURES)
def test_every_run_is_in_the_legend_as_it_is_drawn(name):
    figure = plot.make_figure(name, [ONLINE, OFFLINE])
    assert legend_of(figure) == {"apa": ("C0", "."), "awr": ("C1", "D"), HELD_OUT: ("0.4", "D")}
    (axes,) = figure.axes
    drawn = {(line.get_color(), line.get_marker()) for line in axes.lines if len(line.get_xdata())}
    assert drawn == {("C0", "."), ("C0", "D"), ("C1", "D")}
    assert HELD_OUT not in legend_of(plot.make_figure(name, [ONLINE._replace(held_out=[])]))


def test_the_points_of_a_path_are_joined_in_the_order_of_the_steps():
    (axes,) = plot.make_figure("reward_vs_kl", [ONLINE, OFFLINE]).axes
    lines = [line for line in axes.lines if len(line.get_xdata())]
    assert all(line.get_linestyle() in ("-", "--") for line in lines)
    assert [list(line.get_xdata()) for line in lines] == [[0.25, 2.0, 1.0], [0.5, 1.5], [0.5, 0.25]]
    assert [list(line.get_ydata()) for line in lines] == [[0.5, 1.0, 1.5], [0.75, 1.25], [0.25, 0.5]]


def test_the_pictures_differ_in_title_and_their_axes_have_units():
    drawn = {name: plot.make_figure(name, [ONLINE]).axes[0] for name in plot.FIGURES}
    assert len({axes.get_title(loc="left") for axes in drawn.values()}) == 3
    assert "nats" in drawn["kl"].get_ylabel() and "nats" in drawn["reward_vs_kl"].get_xlabel()
    assert drawn["reward"].get_xlabel() == "optimizer step"


def test_runs_in_folders_of_one_name_are_told_apart(tmp_path, monkeypatch):
    rows = [{"step": 4, "apa/mean_scores": 0.5, "objective/kl": 0.25}]
    paths = [tmp_path / name for name in ("apa/seed0", "ppo/seed0", "ppo/seed1")]
    for path in paths:
        path.mkdir(parents=True)
        (path / "trainer_state.json").write_text(json.dumps({"log_history": rows}))
    named = []
    monkeypatch.setattr(plot, "draw", lambda figure, runs, path: named.append([run.name for run in runs]))
    assert run("plot", *paths, "--output_dir", tmp_path / "p") == 0
    assert named == [["apa/seed0", "ppo/seed0", "seed1"]] * 3
    named.clear()
    assert run("plot", paths[0], paths[1] / "trainer_state.json", "--output_dir", tmp_path / "p") == 0
    assert named == [["apa/seed0", "ppo/seed0"]] * 3


def band_of(*columns):
    """Two seeds of a curve: columns of step, reward, KL, gold reward, the second seed's all 1 higher."""
    rows = [dict(zip(("step", "reward", "kl", "gold_reward"), row, strict=True)) for row in columns]
    higher = [{name: value + (name != "step") for name, value in row.items()} for row in rows]
    return bands([rows, higher])


CURVES = {
    "APA": {"lambda 0.1": band_of((0, 0.0, 0.0, 1.0), (4, 1.0, 3.0, 2.0), (8, 2.0, 2.0, 3.0))},
    "PPO": {"coefficient 0.1": band_of((0, 0.0, 0.0, 1.0)), "coefficient 1": band_of((0, 0.0, 0.0, 1.0))},
}


def test_every_panel_of_a_figure_has_a_title_of_its_own_and_each_row_a_legend_of_its_curves():
    figure = make_figure("fig0", CURVES)
    rows = [figure.axes[:4], figure.axes[4:]]
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert len(set(titles)) == len(titles) == 8
    assert titles[:2] == ["APA: reward", "APA: KL"] and titles[7] == "PPO: gold reward against KL"
    for axes, found in zip(rows, CURVES.values(), strict=True):
        (legend,) = [one.get_legend() for one in axes if one.get_legend() is not None]
        assert [text.get_text() for text in legend.texts] == list(found)
        assert [handle.get_color() for handle in legend.legend_handles] == [line.get_color() for line in axes[0].lines]
    alone = make_figure("fig0", {"in small": CURVES["APA"]})
    assert [axes.get_title(loc="left") for axes in alone.axes] == [
        "Reward",
        "KL",
        "Gold reward",
        "Gold reward against KL",
    ]


def test_a_figure_joins_the_path_of_the_means_in_the_order_of_the_steps():
    """Means of two seeds that differ by 1: half above the first."""
    (line,) = make_figure("fig0", {"p": CURVES["APA"]}).axes[3].lines
    assert line.get_linestyle() == "-" and line.get_marker() == "."
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([0.5, 3.5, 2.5], [1.5, 2.5, 3.5])


def test_more_curves_than_colours_differ_all_the_same():
    curve = CURVES["APA"]["lambda 0.1"]
    axes = make_figure("fig0", {"p": {f"curve {number}": curve for number in range(12)}}).axes[0]
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == 12


def test_the_demo_names_its_diamonds_and_joins_reward_against_kl():
    training = [
        {"iteration": n, "proxy_reward": n / 2, "gold_reward": n / 4, "kl": kl, "entropy": 1.0}
        for n, kl in ((1, 0.0), (2, 3.0), (3, 2.0))
    ]
    ends = {"eval/proxy_reward": 0.5, "eval/gold_reward": 0.5, "eval/kl": 1.0, "eval/entropy": 1.0}
    figure = make_demo_figure("demo", training, [{"iteration": 0, **ends}, {"iteration": 3, **ends}])
    assert list(legend_of(figure)) == ["proxy (learned)", "gold (true)", "diamonds: held-out questions"]
    trade = figure.axes[2]
    assert [list(line.get_xdata()) for line in trade.lines if line.get_marker() == "."] == [[0.0, 3.0, 2.0]] * 2
    assert all(line.get_linestyle() == "-" for line in trade.lines if line.get_marker() == ".")
    assert len({axes.get_title(loc="left") for axes in figure.axes}) == 4
