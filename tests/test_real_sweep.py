"""The sweep on a real model: which runs it makes, whom it lets win, and what its tables say."""

import json
from dataclasses import replace

import pytest

from benchmarks import real_sweep as sweep
from benchmarks import real_sweep_report as sweep_report


FLUENT = {
    "reward": 0.1,
    "kl": 0.0,
    "perplexity": 30.0,
    "distinct_2": 0.9,
    "entropy": 3.0,
    "distinct_1": 0.5,
    "length": 16,
}


UNCHANGED = {name: FLUENT[name] for name in ("entropy", "perplexity", "distinct_2")}


def write(folder, name, options, reward, **metrics):
    history = [{"iteration": i + 1, "reward": reward * i / 10, "kl": i / 2, **UNCHANGED} for i in range(12)]
    row = {"options": vars(options), "history": history, "held_out": {**FLUENT, "reward": reward, **metrics}}
    row["options"] = {key: value for key, value in row["options"].items() if key != "output_dir"}
    (folder / f"{name}.json").write_text(json.dumps(row))


@pytest.fixture
def folder(tmp_path):
    """Every run of every part, in which a higher rate and a smaller coefficient give more reward."""
    for name, options in sweep.runs_of("before", tmp_path).items():
        write(tmp_path, name, options, 0.1)
    for name, options in sweep.runs_of("tune", tmp_path).items():
        smallest = options.kl_coef == min(sweep.COEFFICIENTS[options.loss_type])
        kl = 20.0 if smallest else 5.0
        write(tmp_path, name, options, 100 * options.learning_rate - options.kl_coef / 100, kl=kl)
    for part in ("factors", "all-weights", "compare"):
        for name, options in sweep.runs_of(part, tmp_path).items():
            write(tmp_path, name, options, 0.2 + options.seed / 10, kl=4.0)
    return tmp_path


def test_methods_are_tuned_and_compared_alike(folder):
    tuned, compared = sweep.runs_of("tune", folder), sweep.runs_of("compare", folder)
    assert (len(tuned), len(compared)) == (27, 18)
    assert {options.seed for options in tuned.values()} == {sweep.TUNING_SEED}
    assert sweep.TUNING_SEED not in {options.seed for options in compared.values()}
    for runs in (tuned, compared):
        by_method = [[o for o in runs.values() if o.loss_type == method] for method in sweep.METHODS]
        assert len({len(options) for options in by_method}) == 1
    same = {
        replace(o, loss_type="apa", kl_coef=None, learning_rate=0.0, seed=0, reward="x")
        for o in map(frozen, tuned.values())
    }
    assert len(same) == 1, "methods differ in more than rate and coefficient"


def frozen(options):
    return replace(options, overrides=tuple(sorted(options.overrides.items())))


def test_the_highest_reward_wins_among_those_that_are_readable(folder):
    """Of the highest rate, but not the smallest coefficient, whose KL is 20."""
    for method in sweep.METHODS:
        best = {"learning_rate": max(sweep.LEARNING_RATES), "kl_coef": sorted(sweep.COEFFICIENTS[method])[1]}
        assert sweep.best_settings(folder, method) == best
        options = [o for o in sweep.runs_of("compare", folder).values() if o.loss_type == method]
        assert {(o.learning_rate, o.kl_coef) for o in options} == {tuple(best.values())}


@pytest.mark.parametrize("broken", [{"kl": 10.1}, {"perplexity": 61.0}, {"distinct_2": 0.29}])
def test_what_broken_english_is(broken):
    assert sweep.is_readable(FLUENT | {"kl": 10.0, "perplexity": 60.0, "distinct_2": 0.3}, FLUENT)
    assert not sweep.is_readable(FLUENT | broken, FLUENT)


def test_no_method_wins_without_a_readable_run(folder):
    for name, options in sweep.runs_of("tune", folder).items():
        write(folder, name, options, 1.0, kl=11.0)
    with pytest.raises(ValueError, match="no tuning run of apa is readable"):
        sweep.best_settings(folder, "apa")


def test_the_tables(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["sweep_report", str(folder), str(tmp_path)])
    sweep_report.main()
    text = (tmp_path / "smollm2.md").read_text()
    assert text.strip() == capsys.readouterr().out.strip()
    assert "| **APA** | **0.003** | **0.3** | **0.30** | **5.0** | **30** | **0.90** | **3.00** |" in text
    assert "| *PPO* | *0.001* | *0.01* |" in text  # not readable
    # Seeds 1, 2 and 3 end at rewards of 0.3, 0.4 and 0.5.
    assert "| APA | 0.40 [0.30, 0.50] | 4.0 [4.0, 4.0] | 30 [30, 30] |" in text
    # KL rises by half a nat an iteration, the reward by a tenth of its end: at 2 nats 0.12, 0.16 and 0.20.
    assert "0.16 [0.12, 0.20]" in text
    assert (tmp_path / "smollm2.png").stat().st_size > 10_000
    # The last three iterations: KL 4.5, 5 and 5.5, rewards 0.27, 0.30 and 0.33; PPO's curve is the same.
    assert "| 1 | 5.0 | 0.30 | 0.30 |" in text
    assert "| all weights, rate 1e-05 |" in text and "| mini batch 4 |" in text
    numbers = json.loads((tmp_path / "smollm2.json").read_text())
    assert numbers.keys() == {path.stem for path in folder.glob("*-*.json")}
    run = numbers["compare-sentiment-apa-2"]
    assert (run["options"]["seed"], run["held_out"]["kl"], len(run["history"])) == (2, 4.0, 12)


def test_parts_that_are_not_complete_are_left_out(folder, tmp_path, monkeypatch):
    (folder / "compare-sentiment-apa-1.json").unlink()
    monkeypatch.setattr("sys.argv", ["sweep_report", str(folder), str(tmp_path)])
    sweep_report.main()
    text = (tmp_path / "smollm2.md").read_text()
    assert "## Tuning" in text and "## Sentiment" not in text
