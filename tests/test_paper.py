"""The paper's figures: their files say what the paper prints, and the runner runs, goes on and draws."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from reproduction import command as paper
from reproduction.drawing import bands, draw_figure
from reproduction.figures import INDEX, MINI, read_figure
from reproduction.logs import QUANTITIES, read_rows
from reproduction.mini import algorithm_options, run_mini, run_name
from reproduction.sizes import MiniSizes
from reproduction.tables import tables, value_at_kl
from reproduction.tasks import DemoTask
from reproduction.win_rates import read_comparison
from tests._cli import refused, run
from trl_apa import APATrainer
from trl_apa.cli import BUG
from trl_apa.commands import offline, train_options
from trl_apa.commands.options import read_yaml


FOLDER = Path(__file__).parents[1] / "reproduction" / "configs"
WIN_RATES = "fig1"
FIGURES = sorted(read_yaml(str(FOLDER / INDEX)).keys() - {MINI, WIN_RATES})
OF_THE_PAPER = [name for name in FIGURES if name.startswith("fig")]
PARSERS = {"train": train_options.make_parser, "offline": offline.make_parser}


def curves_of(name):
    figure = read_figure(FOLDER, name)
    return [(figure, panel, label, curve) for panel, found in figure.panels.items() for label, curve in found.items()]


CURVES = [curve for name in OF_THE_PAPER for curve in curves_of(name)]


@pytest.mark.parametrize(("figure", "panel", "label", "curve"), CURVES, ids=[curve.file.stem for *_, curve in CURVES])
def test_a_curve_s_options_exist_and_fit_together(figure, panel, label, curve, tmp_path):
    file = curve.file
    parser = PARSERS[figure.command]()
    values = parser.parse(["--config", str(file), "--use_cpu"])
    *_, config, _ = parser.build({**values, "output_dir": str(tmp_path)})
    losses = {"PPO": "ppo", "AWR": "awr", "APA": "apa", "ILQL": "ilql"}
    assert config.loss_type == losses.get(label, {"fig7": "apa", "fig8": "ppo"}.get(figure.name))
    assert f"trl-apa {figure.command} --config reproduction/configs/{file.name}" in file.read_text()
    assert (values["max_prompt_length"] or 0) + config.max_completion_length == 1024


def test_every_file_is_a_curve_of_a_figure():
    comparison = read_comparison(FOLDER, WIN_RATES)
    others = {INDEX, comparison.generate.name, comparison.winrate.name}
    assert {curve.file.name for *_, curve in CURVES} == {path.name for path in FOLDER.glob("*.yaml")} - others
    assert OF_THE_PAPER == [f"fig{number}" for number in range(2, 10)]


@pytest.mark.slow
def test_the_sweeps_run_at_full_size_too_and_every_curve_has_a_rate_in_small(tmp_path):
    for figure, _, label, curve in (found for name in FIGURES for found in curves_of(name)):
        if curve.file is None:
            assert figure.only_mini
            continue
        parser = PARSERS[figure.command]()
        flags = [text for name, value in curve.changed.items() for text in (f"--{name}", str(value).lower())]
        values = parser.parse(["--config", str(curve.file), "--use_cpu", *flags])
        parser.build({**values, "output_dir": str(tmp_path)})
        options = algorithm_options(figure.command, curve)
        assert isinstance(options["learning_rate"], float) and curve.changed.items() <= options.items()
        coefficient = options.get("kl_coef", options.get("ilql_beta", options.get("init_kl_coef")))
        if figure.name.startswith("lambda"):
            assert label.split()[-1] == str(coefficient)
        if figure.name.startswith("tune"):
            assert float(label.removeprefix("rate ")) == options["learning_rate"]


def options_of(figure, panel, label):
    return read_figure(FOLDER, figure).panels[panel][label].options()


@pytest.mark.parametrize(
    ("figure", "panel", "batch", "rate", "rollouts"),
    [("fig3", "125M", 8, 8e-6, 128), ("fig3", "1B", 2, 1e-6, 64), ("fig4", "6B", 1, 1e-6, 64)],
)
def test_the_settings_on_hh_are_those_that_the_paper_prints(figure, panel, batch, rate, rollouts):
    for label, coefficient in (("APA", ("kl_coef", 0.1)), ("AWR", ("kl_coef", 1.0)), ("PPO", ("init_kl_coef", 0.05))):
        options = options_of(figure, panel, label)
        assert options["model_name_or_path"] == f"Dahoas/pythia-{panel}-static-sft"
        assert options["reward_model_name_or_path"] == "Dahoas/gptj-rm-static"
        assert options["dataset_name"] == "Dahoas/static-hh" and options["max_eval_rows"] == 280
        assert (options["per_device_train_batch_size"], float(options["learning_rate"])) == (batch, rate)
        assert (options["batch_size"], options["num_epochs_per_batch"], options["max_steps"]) == (rollouts, 2, 20000)
        assert options["num_unfrozen_layers"] == 2 and options["max_completion_length"] == 128
        assert options[coefficient[0]] == coefficient[1]
    assert (options["target"], options["horizon"], options["cliprange"], options["cliprange_value"]) == (
        6,
        10000,
        0.2,
        0.2,
    )


def test_seeds_lambdas_and_the_other_data_are_those_that_the_paper_prints():
    seeds = {name: read_figure(FOLDER, name).seeds for name in OF_THE_PAPER}
    assert [seeds[name] for name in ("fig3", "fig4", "fig9")] == [[0, 100, 1000]] * 3
    assert [seeds[name] for name in ("fig5", "fig6")] == [[0, 100]] * 2
    assert [seeds[name] for name in ("fig7", "fig8")] == [[1000]] * 2
    assert [options_of("fig7", "125M", f"lambda {lam}")["kl_coef"] for lam in (0.1, 1)] == [0.1, 1.0]
    assert options_of("fig6", "Dolly 7B", "APA")["kl_coef"] == 1.0
    free = options_of("fig8", "125M", "no KL control")
    assert free["init_kl_coef"] == 0 and free["adap_kl_ctrl"] is False
    table_1 = options_of("fig2", "LLaMA-7B", "PPO")
    expected = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 8, "lora_r": 16, "init_kl_coef": 0.1}
    assert expected.items() <= table_1.items() and float(table_1["learning_rate"]) == 2e-5
    assert options_of("fig2", "LLaMA-7B", "APA")["kl_coef"] == 0.1
    assert options_of("fig5", "6B", "APA")["model_name_or_path"] == "CarperAI/openai_summarize_tldr_sft"


# ---- reading and drawing ----


def index(tmp_path, **entry):
    (tmp_path / "curve.yaml").write_text("loss_type: awr\nkl_coef: 0.25\nlearning_rate: 1e-6\nvalue_epochs: 1\n")
    whole = {"title": "t", "command": "train", "seeds": [0], "panels": {"p": {"A": "curve.yaml"}}, **entry}
    (tmp_path / INDEX).write_text(json.dumps({"figx": {k: v for k, v in whole.items() if v is not None}}))
    return tmp_path


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({"seeds": None}, "figx lacks seeds"),
        ({"command": "rm"}, "command is 'rm'; it should be train or offline"),
        ({"panels": {"p": {"A": "none.yaml"}}}, r"names none\.yaml, which is not there"),
        (
            {"panels": {"p": {"A": {"file": "curve.yaml", "sets": {}}}}},
            "a curve has file, sets; it should have file, and may",
        ),
        ({"panels": {"p": {"A": {"set": {"kl_coef": 1}}}}}, "a curve has set; it should have file, and may"),
    ],
)
def test_an_index_that_is_wrong_is_refused(tmp_path, entry, problem):
    with pytest.raises(ValueError, match=problem):
        read_figure(index(tmp_path, **entry), "figx")
    with pytest.raises(ValueError, match=r"but not 'figz'; did you mean 'figx'\?"):
        read_figure(tmp_path, "figz")


def rows(*triples, **more):
    return [{"step": step, "reward": reward, "kl": kl, **more} for step, reward, kl in triples]


def test_a_band_is_mean_and_extremes_at_the_common_steps():
    runs = [rows((0, 1.0, 0.0), (4, 2.0, 0.5), (8, 9.0, 9.0)), rows((0, 3.0, 0.0), (4, 5.0, 1.5))]
    assert bands(runs) == {
        "reward": ([0, 4], [2.0, 3.5], [1.0, 2.0], [3.0, 5.0]),
        "kl": ([0, 4], [0.0, 1.0], [0.0, 0.5], [0.0, 1.5]),
    }
    with pytest.raises(ValueError, match="the 2 runs of a curve have no step in common"):
        bands([runs[0], rows((1, 0.0, 0.0))])


def test_held_out_prompts_go_before_rollouts(tmp_path):
    history = [
        {"step": 1, "apa/mean_scores": 1.0, "objective/kl": 0.5},
        {"step": 1, "loss": 2.0},
        {"step": 2, "eval_reward": 3.0, "eval_kl": 4.0, "eval_distinct": 0.5, "eval_runtime": 9.0},
    ]
    file = tmp_path / "trainer_state.json"
    file.write_text(json.dumps({"log_history": history}))
    assert read_rows(tmp_path) == [{"step": 2, "reward": 3.0, "kl": 4.0, "distinct": 0.5}]
    file.write_text(json.dumps({"log_history": history[:2]}))
    assert read_rows(tmp_path) == [{"step": 1, "reward": 1.0, "kl": 0.5}]
    file.write_text(json.dumps({"log_history": history[1:2]}))
    with pytest.raises(ValueError, match="has neither eval_reward and eval_kl nor"):
        read_rows(tmp_path)


def test_the_picture_comes_with_its_numbers(tmp_path):
    for name, more in (("f", {}), ("g", {"gold_reward": 3.0})):
        runs = [rows((0, 1.0, 0.0), (4, 2.0, 0.5), **more)]
        draw_figure("t", {"p": {"A": runs}, "q": {"A": runs, "B": runs}}, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert json.loads((tmp_path / f"{name}.json").read_text()) == {"p": {"A": runs}, "q": {"A": runs, "B": runs}}


def test_a_log_that_does_not_begin_with_the_initial_model():
    """As at full size, where the first evaluation follows some updates."""
    run = rows((1000, 1.0, 3.0), (2000, 5.0, 1.0), (3000, 9.0, 4.0))
    assert value_at_kl(run, "reward", 2.0) is None  # it was there before the first evaluation
    assert value_at_kl(run, "reward", 3.5) == 5.0 + 2.5 / 3 * 4
    assert "| A | 5.00 |" in tables({"p": {"A": [run]}})  # (1 + 5 + 9) / 3
    assert "| A | 1.00 |" in tables({"p": {"A": [run[:1]]}})


def test_the_reward_at_a_kl_is_that_of_its_first_crossing():
    run = rows((0, 0.0, 0.0), (4, 2.0, 4.0), (8, 1.0, 2.0), (12, 6.0, 10.0))
    assert value_at_kl(run, "reward", 1.0) == 0.5  # a quarter of the way from 0 to 4 nats, so a quarter of 2
    assert value_at_kl(run, "reward", 3.0) == 1.5  # at the first crossing, not the second
    assert value_at_kl(run, "reward", 4.0) == 2.0
    assert value_at_kl(run, "reward", 6.0) == 1.0 + 4 / 8 * 5
    assert value_at_kl(run, "reward", 10.5) is None


def test_tables_by_hand():
    golds = [0.0, 3.0, 1.0], [0.0, 2.0, 4.0]
    runs = [
        [
            {"step": step, "reward": step / 4, "kl": kl * step / 4, "gold_reward": gold}
            for step, gold in zip((0, 4, 8), run, strict=True)
        ]
        for kl, run in zip((4, 2), golds, strict=True)
    ]
    text = tables({"p": {"A": runs}})
    assert "| A | 2.00 [2.00, 2.00] | 2.50 [1.00, 4.00] | 6.00 [4.00, 8.00] |" in text  # the last evaluation
    # the mean of the two evaluations after the first update: gold (3 + 1) / 2 and (2 + 4) / 2
    assert "| A | 1.50 [1.50, 1.50] | 2.50 [2.00, 3.00] |" in text
    # 1 nat: 1/4 of the first run's first interval, half of the second's: gold 3 / 4 and 2 / 2
    # 2 nats: half of the first run's first interval, all of the second's; 5 nats: 1/4 of the first run's second
    at_1_nat, at_2_nats = "0.38 [0.25, 0.50] | 0.88 [0.75, 1.00]", "0.75 [0.50, 1.00] | 1.75 [1.50, 2.00]"
    assert f"| A | {at_1_nat} | {at_2_nats} | 1.25 (1 of 2) | 2.50 (1 of 2) |" in text
    # the highest gold reward: step 4 of the first run, step 8 of the second
    assert "| A | 6 [4, 8] | 1.50 [1.00, 2.00] | 3.50 [3.00, 4.00] | 4.00 [4.00, 4.00] |" in text
    assert "| q, B |" in tables({"p": {"A": runs}, "q": {"B": runs}})
    assert "| A (1 of 2 ended early) | 1.50 [1.00, 2.00] |" in tables({"p": {"A": [runs[0][:2], runs[1]]}})
    assert "gold" not in tables({"p": {"A": [rows((0, 1.0, 0.0), (4, 2.0, 0.5))]}}) and "CPU" not in text
    timed = [rows((0, 1.0, 0.0), (4, 2.0, 0.5)) for _ in range(2)]
    timed[0][1]["cpu_seconds"], timed[1][1]["cpu_seconds"] = 10.0, 12.0
    assert tables({"p": {"A": timed}}).endswith("| curve | CPU seconds |\n| --- | --- |\n| A | 11 [10, 12] |\n")


# ---- running ----


def log(folder):
    folder.mkdir(parents=True, exist_ok=True)
    history = [{"step": step, "eval_reward": step / 2, "eval_kl": step / 4} for step in (4, 8)]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))


def test_full_size_runs_a_process_a_curve_and_seed_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    commands, failing = [], [0, 1]

    def run(command, check):
        commands.append(command[3:])
        folder = Path(command[command.index("--output_dir") + 1])
        status = failing.pop(0) if failing else 0
        if status == 0:
            log(folder)
        else:
            (folder / "checkpoint-4").mkdir(parents=True)
        return SimpleNamespace(returncode=status)

    monkeypatch.setattr(subprocess, "run", run)
    changed = {"kl_coef": 0.5, "scale_rewards": True}
    folder = index(tmp_path, panels={"p": {"A": {"file": "curve.yaml", "set": changed, "mini": {"gamma": 0.5}}}})
    argv = ["figx", "--scale", "full", "--configs", str(folder), "--output_dir", str(tmp_path / "out")]
    argv += ["--seeds", "0", "7", "--", "--num_processes", "8"]
    assert paper.main(argv) == 1
    assert "run this again to continue" in capsys.readouterr().err and not (tmp_path / "out" / "figx.png").exists()
    assert paper.main(argv) == 0
    start = ["train", "--config", str(folder / "curve.yaml"), "--kl_coef", "0.5", "--scale_rewards", "true", "--seed"]
    ends = [["0", "--output_dir", str(tmp_path / "out" / "p-a-seed0"), "--num_processes", "8"]]
    second = ["7", "--output_dir", str(tmp_path / "out" / "p-a-seed7"), "--num_processes", "8"]
    ends += [second, [*second, "--resume_from_checkpoint", "true"]]
    assert commands == [[*start, *end] for end in ends]
    assert (tmp_path / "out" / "figx.png").is_file()
    assert paper.main(argv) == 0 and len(commands) == 3


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """As where the wheel is installed: `reproduction` is not to be found, unless the current folder has it."""
    kept = [entry for entry in sys.path if not (Path(entry) / "reproduction").is_dir()]
    monkeypatch.setattr(sys, "path", kept)
    for name in [name for name in sys.modules if name.partition(".")[0] == "reproduction"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "argv", [["fig8", "--scale", "mini"], ["fig1", "--scale", "full", "--seeds", "0"], ["--help"]]
)
@pytest.mark.parametrize(
    "files", [[], ["reproduction/__init__.py"], ["reproduction"], ["reproduction/configs/figures.yaml"]]
)
def test_an_installed_wheel_says_where_the_figures_are(capsys, installed, files, argv):
    """Also in a folder with something else of that name."""
    for file in map(Path, files):
        file.parent.mkdir(exist_ok=True, parents=True)
        file.touch()
    told = refused(capsys, "paper", *argv)
    assert told.startswith("trl-apa paper: the paper's figures are not in the wheel: run this in the root of a clone")
    assert len(told.splitlines()) == 1 and "pip download" in told


def test_an_installed_wheel_draws_the_figures_in_a_clone(capsys, installed, monkeypatch):
    monkeypatch.chdir(FOLDER.parents[1])
    path = list(sys.path)
    told = refused(capsys, "paper", "fig0", "--scale", "mini")
    assert f"{FOLDER / INDEX} has fig1, fig2, fig3" in told and "but not 'fig0'; did you mean" in told
    assert len(told.splitlines()) == 1 and sys.path == [*path, str(FOLDER.parents[1])]


def test_an_error_in_the_code_of_the_figures_is_a_bug_and_not_the_user_s(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(paper, "read_entry", len)
    assert run("paper", "fig3", "--scale", "mini", "--output_dir", tmp_path) == BUG
    assert "unexpected TypeError: len()" in capsys.readouterr().err


TINY = (
    "--iterations 2 --epochs 2 --evaluations 2 --samples_per_prompt 1 --batch_size 8 --num_responses 16 --sft_steps 3 "
    "--num_pairs 16 --reward_steps 2"
).split()


def test_in_small_a_curve_is_run_once_for_all_figures_and_panels(tmp_path, capsys):
    curves = {"A": "curve.yaml", "B": {"file": "curve.yaml", "set": {"kl_coef": 1.0}}}
    folder = index(tmp_path, command="offline", panels={"p": curves, "q": curves})
    content = json.loads((folder / INDEX).read_text())
    content |= {"figy": {**content["figx"], "panels": {"r": {"C": "curve.yaml"}, "s": {"B": curves["B"]}}}}
    (folder / INDEX).write_text(json.dumps({"mini": {"offline": {"awr": {"learning_rate": 1e-3}}}, **content}))
    argv = ["--scale", "mini", "--configs", str(folder), "--output_dir", str(tmp_path / "out"), *TINY]
    assert paper.main(["figx", *argv]) == 0
    numbers = json.loads((tmp_path / "out" / "figx.json").read_text())
    assert list(numbers) == ["in small"]  # the panels would be the same
    (run,) = numbers["in small"]["A"]
    assert [row["step"] for row in run] == [0, 1, 2] and run[0]["kl"] == pytest.approx(0.0, abs=1e-4)
    assert run[2].keys() == {"step", "samples", *QUANTITIES} and "| A |" in (tmp_path / "out" / "figx.md").read_text()
    logs = {path: path.read_text() for path in (tmp_path / "out" / "runs").glob("*/trainer_state.json")}
    assert len(logs) == 2
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines if line.startswith("epoch")] == [["epoch", "1/2"], ["epoch", "2/2"]] * 2
    last = f"held-out reward {run[2]['reward']:+.3f}  held-out gold reward {run[2]['gold_reward']:+.3f}"
    assert any(line.startswith("epoch 2/2") and last in line for line in lines)
    assert paper.main(["figy", *argv]) == 0 and "seed 0" not in capsys.readouterr().out
    assert {path: path.read_text() for path in (tmp_path / "out" / "runs").glob("*/trainer_state.json")} == logs
    assert list(json.loads((tmp_path / "out" / "figy.json").read_text())) == ["r", "s"]
    options = [json.loads((path.parent / "options.json").read_text()) for path in logs]
    assert sorted(found["kl_coef"] for found in options) == [0.25, 1.0]
    assert all(found["learning_rate"] == 1e-3 and found["sizes"]["epochs"] == 2 for found in options)
    for path in logs:
        assert (path.parent / "policy" / "model.safetensors").is_file()
    assert "but not 'figz'" in refused(capsys, "paper", "figz", *argv)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Tiny, with evaluations after two of three iterations or epochs."""
    sizes = MiniSizes(
        iterations=3,
        epochs=3,
        evaluations=2,
        samples_per_prompt=1,
        batch_size=8,
        num_responses=16,
        sft_steps=3,
        num_pairs=16,
        reward_steps=2,
    )
    return DemoTask(tmp_path_factory.mktemp("task"), sizes)


def run_in(folder, task, command, **options):
    run_mini(task, command, {"learning_rate": 1e-3, **options}, 5, folder)
    return read_rows(folder)


def test_in_small_a_curve_that_samples_learns_from_its_own_samples(tmp_path, task, capsys):
    run = run_in(tmp_path / "two", task, "train", loss_type="apa", kl_coef=0.1, num_epochs_per_batch=2)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("iteration")]
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3"] and all("  KL " in line for line in lines)
    assert ["held-out" in line for line in lines] == [False, True, True]
    assert f"held-out reward {run[2]['reward']:+.3f}" in lines[2]
    # two epochs of one mini-batch of 8 an iteration; the second and the third are followed by an evaluation
    assert [(row["step"], row["samples"]) for row in run] == [(0, 0), (4, 16), (6, 24)]
    assert run[0]["kl"] == pytest.approx(0.0, abs=1e-4) and run[2]["kl"] > 1e-6
    # evaluating once more changes nothing of what is learned
    task.sizes, two = replace(task.sizes, evaluations=3), task.sizes
    again = run_in(tmp_path / "three", task, "train", loss_type="apa", kl_coef=0.1, num_epochs_per_batch=2)
    task.sizes = two
    for row in again + run:
        row.pop("cpu_seconds", None)
    assert [row["step"] for row in again] == [0, 2, 4, 6] and again[2:] == run[1:]


def test_in_small_ilql_is_measured_as_its_values_shift_it(tmp_path, task):
    options = {"loss_type": "ilql", "polyak": 1.0, "bc_coef": 0.0, "learning_rate": 3e-3}
    kls = [run_in(tmp_path / str(beta), task, "offline", ilql_beta=beta, **options)[-1]["kl"] for beta in (0.0, 8.0)]
    assert kls[0] == pytest.approx(0.0, abs=1e-6) and kls[1] > 1e-3  # with bc_coef=0 only the values move it


def test_a_run_that_is_no_longer_finite_ends_with_what_was_measured(tmp_path, task, monkeypatch):
    step = APATrainer.step

    def spoil(trainer, *args):
        found = step(trainer, *args)
        if trainer.state.global_step == 6:
            next(trainer.model.policy.parameters()).data.fill_(float("nan"))
        return found

    monkeypatch.setattr(APATrainer, "step", spoil)
    run = run_in(tmp_path, task, "train", loss_type="awr", kl_coef=1.0, num_epochs_per_batch=2)
    assert [row["step"] for row in run] == [0, 4]
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert log[-1] == {"ended_early": "the policy has weights that are not finite"}


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        ("fig8 --scale mini -- --num_processes 8", "'--num_processes' comes after --"),
        ("fig8 --scale full --runs x", "--runs needs fig1 with --scale full"),
        ("fig1 --scale mini --runs x", "--runs needs fig1 with --scale full"),
        ("fig8 --scale full --iterations 2", "--iterations needs --scale mini"),
    ],
)
def test_what_would_have_no_effect_is_refused(capsys, argv, problem):
    argv = [*argv.split()[:3], "--configs", FOLDER, *argv.split()[3:]]
    assert problem in refused(capsys, "paper", *argv)


def test_a_figure_about_the_task_in_small_has_no_full_size(tmp_path, capsys):
    said = refused(capsys, "paper", "tune", "--scale", "full", "--configs", FOLDER, "--output_dir", tmp_path)
    assert "tune is about the task in small" in said


def test_the_name_of_a_run_tells_options_sizes_and_seeds_apart():
    curve = read_figure(FOLDER, "fig3").panels["125M"]["APA"]
    options = algorithm_options("train", curve)
    assert options["kl_coef"] == 0.1 and "model_name_or_path" not in options
    names = [
        run_name("train", options, 0, MiniSizes()),
        run_name("train", options, 1, MiniSizes()),
        run_name("train", options, 0, MiniSizes(iterations=2)),
        run_name("train", {**options, "kl_coef": 0.2}, 0, MiniSizes()),
    ]
    assert len(set(names)) == 4
    assert names[0] == run_name("train", dict(reversed(options.items())), 0, MiniSizes(epochs=2))
    assert names[0] == run_name("train", {**options, "num_epochs_per_batch": 2.0}, 0, MiniSizes())
