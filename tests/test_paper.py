"""The paper's figures: their files say what the paper prints, and the runner runs, goes on and draws."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from trl_apa.commands import offline, paper, train
from trl_apa.commands.options import read_yaml
from trl_apa.commands.plot import Run
from trl_apa.paper.drawing import bands, draw_figure
from trl_apa.paper.figures import INDEX, read_figure


FOLDER = Path(__file__).parents[1] / "examples" / "paper"
FIGURES = sorted(read_yaml(str(FOLDER / INDEX)))
PARSERS = {"train": train.make_parser, "offline": offline.make_parser}


def curves_of(name):
    figure = read_figure(FOLDER, name)
    return [(figure, panel, label, file) for panel, found in figure.panels.items() for label, file in found.items()]


CURVES = [curve for name in FIGURES for curve in curves_of(name)]


@pytest.mark.parametrize(("figure", "panel", "label", "file"), CURVES, ids=[file.stem for *_, file in CURVES])
def test_a_curve_s_options_exist_and_fit_together(figure, panel, label, file, tmp_path):
    parser = PARSERS[figure.command]()
    values = parser.parse(["--config", str(file), "--use_cpu"])
    *_, config, _ = parser.build({**values, "output_dir": str(tmp_path)})
    losses = {"PPO": "ppo", "AWR": "awr", "APA": "apa", "ILQL": "ilql"}
    assert config.loss_type == losses.get(label, {"fig7": "apa", "fig8": "ppo"}.get(figure.name))
    assert f"trl-apa {figure.command} --config examples/paper/{file.name}" in file.read_text()
    assert (values["max_prompt_length"] or 0) + config.max_completion_length == 1024


def test_every_file_is_a_curve_of_a_figure():
    assert {file.name for *_, file in CURVES} == {path.name for path in FOLDER.glob("*.yaml")} - {INDEX}
    assert FIGURES == [f"fig{number}" for number in range(2, 10)]


def options_of(figure, panel, label):
    return read_yaml(str(read_figure(FOLDER, figure).panels[panel][label]))


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
    seeds = {name: read_figure(FOLDER, name).seeds for name in FIGURES}
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
    ],
)
def test_an_index_that_is_wrong_is_refused(tmp_path, entry, problem):
    with pytest.raises(ValueError, match=problem):
        read_figure(index(tmp_path, **entry), "figx")
    with pytest.raises(ValueError, match=r"but not 'figz'; did you mean 'figx'\?"):
        read_figure(tmp_path, "figz")


def test_a_band_is_mean_and_extremes_at_the_common_steps():
    runs = [
        Run("a", [(0, 1.0, 0.0), (4, 2.0, 0.5), (8, 9.0, 9.0)], []),
        Run("b", [(0, 3.0, 0.0), (4, 5.0, 1.5)], []),
        Run("c", [(0, 9.0, 9.0)], [(0, 5.0, 0.0), (4, 2.0, 1.0)]),  # held-out prompts go before rollouts
    ]
    reward, kl = bands(runs)
    assert reward == ([0, 4], [3.0, 3.0], [1.0, 2.0], [5.0, 5.0])
    assert kl == ([0, 4], [0.0, 1.0], [0.0, 0.5], [0.0, 1.5])
    with pytest.raises(ValueError, match="the runs a, d have no step in common"):
        bands([runs[0], Run("d", [(1, 0.0, 0.0)], [])])


def test_the_picture_comes_with_its_numbers(tmp_path):
    runs = [Run("a", [(0, 1.0, 0.0), (4, 2.0, 0.5)], [])]
    draw_figure("t", {"p": {"A": runs}, "q": {"A": runs, "B": runs}}, tmp_path / "f.png")
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "f.json").read_text())["q"]["B"]["kl"]["mean"] == [0.0, 0.5]


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

    monkeypatch.setattr(paper.subprocess, "run", run)
    folder = index(tmp_path)
    argv = [
        "figx",
        "--scale",
        "full",
        "--configs",
        str(folder),
        "--output_dir",
        str(tmp_path / "out"),
        "--seeds",
        "0",
        "7",
    ]
    argv += ["--", "--num_processes", "8"]
    assert paper.main(argv) == 1
    assert "run this again to go on" in capsys.readouterr().err and not (tmp_path / "out" / "figx.png").exists()
    assert paper.main(argv) == 0
    start = ["train", "--config", str(folder / "curve.yaml"), "--seed"]
    ends = [["0", "--output_dir", str(tmp_path / "out" / "p-a-seed0"), "--num_processes", "8"]]
    second = ["7", "--output_dir", str(tmp_path / "out" / "p-a-seed7"), "--num_processes", "8"]
    ends += [second, [*second, "--resume_from_checkpoint", "true"]]
    assert commands == [[*start, *end] for end in ends]
    assert (tmp_path / "out" / "figx.png").is_file()
    assert paper.main(argv) == 0 and len(commands) == 3


def test_in_small_an_offline_curve_is_run_on_the_demo_s_task(tmp_path, capsys):
    folder = index(tmp_path, command="offline", panels={"p": {"A": "curve.yaml"}, "q": {"A": "curve.yaml"}})
    argv = ["figx", "--scale", "mini", "--configs", str(folder), "--output_dir", str(tmp_path / "out"), "--seeds", "0"]
    argv += "--iterations 2 --batch_size 8 --num_responses 16 --sft_steps 3 --num_pairs 16 --reward_steps 2".split()
    assert paper.main(argv) == 0
    # the panels would be the same
    numbers = json.loads((tmp_path / "out" / "figx.json").read_text())
    assert list(numbers) == ["in small"] and numbers["in small"]["A"]["reward"]["steps"] == [0, 1, 2]
    assert numbers["in small"]["A"]["kl"]["mean"][0] == pytest.approx(0.0, abs=1e-4)
    before = (tmp_path / "out" / "p-a-seed0" / "trainer_state.json").read_text()
    capsys.readouterr()
    assert paper.main(argv) == 0 and "seed 0" not in capsys.readouterr().out
    assert (tmp_path / "out" / "p-a-seed0" / "trainer_state.json").read_text() == before
    with pytest.raises(SystemExit) as ended:
        paper.main(["figz", *argv[1:]])
    assert ended.value.code == 2 and "but not 'figz'" in capsys.readouterr().err
