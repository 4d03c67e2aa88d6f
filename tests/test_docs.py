"""The documentation tells the truth: its scripts run, its links lead somewhere, and what it names exists."""

import ast
import gzip
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPTNeoXConfig,
    PreTrainedTokenizerFast,
)

import trl_apa
from tests.fake_vllm import install
from tests.tiny import byte_tokenizer, lora_config, tiny_pairs, tiny_trainer
from trl_apa.algorithms import ALGORITHMS
from trl_apa.cli import COMMANDS
from trl_apa.trainer.reporting import reward_statistics


ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path
    for folder in (
        ".",
        "docs",
        "examples",
        "examples/calculator",
        "examples/hh",
        "examples/llama_factory",
        "reproduction",
        "examples/stack_llama",
        "benchmarks",
        "parity",
    )
    for path in ROOT.glob(f"{folder}/*.md")
)
OURS = [page for page in PAGES if page.parent.name != "hh"]
STAGES = ("trainer", "rollout", "algorithms", "models", "distributed", "config", "redaction", "classic", "evaluation")
MODULES = {
    path.stem: f"trl_apa.{path.parent.name}.{path.stem}"
    for stage in STAGES
    for path in ROOT.glob(f"trl_apa/{stage}/*.py")
} | {"models": "trl_apa.models", "redaction": "trl_apa.redaction", "algorithms": "trl_apa.algorithms"}
del MODULES["__init__"], MODULES["apa"]
LOSS_TYPES = tuple(ALGORITHMS)
MODEL_NAME = "EleutherAI/pythia-160m"
README_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def page_id(path):
    return str(path.relative_to(ROOT))


def without_fences(text):
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def fenced(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), flags=re.MULTILINE | re.DOTALL)


@contextmanager
def extension(number, folder, monkeypatch):
    """A module of `docs/extending.md`, importable as a user's is, and the config that its script makes.

    `number` counts the page's pairs of module and script from 0; the module's first line says its name.
    """
    module, script = fenced(ROOT / "docs" / "extending.md", "python")[2 * number : 2 * number + 2]
    name = re.match(r"# (\w+)\.py\n", module)[1]
    (folder / f"{name}.py").write_text(module)
    monkeypatch.syspath_prepend(str(folder))
    namespace = {}
    exec(script, namespace)
    yield namespace["config"]
    sys.modules.pop(name, None)


def code_spans(path):
    """Inline code: what stands between backticks outside fenced blocks."""
    return re.findall(r"`([^`\n]+)`", without_fences(path.read_text()))


def code(path):
    """Everything that is set as code: inline, fenced or indented."""
    text = path.read_text()
    indented = re.findall(r"^ {4}.*$", without_fences(text), flags=re.MULTILINE)
    return "\n".join(
        [*re.findall(r"^```.*?^```$", text, flags=re.MULTILINE | re.DOTALL), *code_spans(path), *indented]
    )


def anchors(path):
    """The fragments that GitHub gives the page's headings."""
    headings = re.findall(r"^#+ (.*)$", without_fences(path.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_fences(page.read_text())):
        if "://" in target:
            continue
        name, _, fragment = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), f"{target} is not there"
        assert not fragment or fragment in anchors(linked), f"{target}: no such heading"


def test_make_targets_and_commands_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {page: code(page) for page in PAGES}
    makes = {target for text in named.values() for target in re.findall(r"\bmake ([a-z][a-z-]*)", text)}
    commands = {name for text in named.values() for name in re.findall(r"\btrl-apa ([a-z]+)", text)}
    assert {"demo", "test"} <= makes <= targets
    assert {"demo"} <= commands <= set(COMMANDS)


def functions_of(path):
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("page", OURS, ids=page_id)
def test_files_and_tests_that_are_named_exist(page):
    for span in code_spans(page):
        match = re.fullmatch(
            r"((?:[\w.-]+/)*[\w.-]+\.(?:py|md|toml|txt)|(?:trl_apa|tests|docs|examples|benchmarks|parity|reproduction)/[\w/]*)(?:::(\w+))?",
            span,
        )
        if match is None:
            continue
        path, test = ROOT / match[1], match[2]
        assert path.exists(), f"{span} is not there"
        assert test is None or test in functions_of(path), f"{span}: no such test"


def resolves(dotted):
    """Whether `module.name.attribute` of the package, or `PublicName.attribute`, exists; None if it is neither."""
    first, *rest = dotted.split(".")
    if first in trl_apa.__all__:
        owner = getattr(trl_apa, first)
    elif first in MODULES:
        owner = import_module(MODULES[first])
    else:
        return None
    for name in rest:
        if not hasattr(owner, name):
            return False
        owner = getattr(owner, name)
    return True


@pytest.mark.parametrize("page", OURS, ids=page_id)
def test_functions_that_are_named_exist(page):
    for span in code_spans(page):
        match = re.fullmatch(r"(\w+(?:\.\w+)+)(?:\(.*\))?", span)
        assert match is None or resolves(match[1]) is not False, f"{span} does not exist"


def test_the_checks_find_what_is_wrong():
    assert resolves("losses.apa_loss") and resolves("APATrainer.step")
    assert resolves("losses.no_such_loss") is False and resolves("APATrainer.leap") is False
    assert resolves("tokenizer.pad_token") is None
    assert "what-z--1-does" in anchors(ROOT / "docs" / "algorithm.md")
    names = {name for page in OURS for span in code_spans(page) for name in re.findall(r"^(\w+\.\w+)$", span)}
    assert sum(bool(resolves(name)) for name in names) > 15
    assert sum("::test_" in span for page in OURS for span in code_spans(page)) > 50


def test_the_design_lists_every_file_of_the_package():
    listed = set(code_spans(ROOT / "docs" / "design.md"))
    package = ROOT / "trl_apa"
    files = {f"trl_apa/{path.name}" for path in package.glob("*.py") if path.name != "__init__.py"}
    files |= {f"trl_apa/{path.parent.name}/" for path in package.glob("*/__init__.py")}
    for folder in set(STAGES) - {"models"}:
        files |= {f"trl_apa/{folder}/{path.name}" for path in (package / folder).glob("*.py")}
    files -= {f"trl_apa/{folder}/__init__.py" for folder in STAGES}
    assert files - listed == set()


def documented_statistics():
    """The keys in the tables of docs/statistics.md, by heading."""
    keys, heading = {}, None
    for line in (ROOT / "docs" / "statistics.md").read_text().splitlines():
        if line.startswith("## "):
            heading = line[3:]
        if match := re.match(r"\| `([\w/]+)` \|", line):
            assert match[1] not in keys.setdefault(heading, []), f"{match[1]} stands there twice"
            keys[heading].append(match[1])
    return {heading: set(names) for heading, names in keys.items()}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_glossary_has_the_statistics_that_are_returned(tmp_path, loss_type):
    documented = documented_statistics()
    trainer = tiny_trainer(tmp_path, loss_type=loss_type)
    queries, responses, scores = tiny_pairs()
    compared = trainer.args.estimator.needs_ref_rewards
    given = {"ref_rewards": [[0.0, 1.0]] * 4} if compared else {}
    stats = trainer.step(queries, responses, scores, **given)
    own = {name for name in stats if "ppo/" not in name}
    arrays = {name for name in own if not isinstance(stats[name], float)}
    assert documented["Arrays"] == arrays
    expected = documented["For every loss"] | documented[f'Only with `loss_type="{loss_type}"`']
    if trainer.args.estimator.needs_values:
        expected |= documented["Only with a value model"]
    if trainer.args.needs_groups:
        expected |= documented["Only where responses to a prompt are compared"]
    if compared:
        expected |= documented["Only with rewards of responses of pi_init"]
    assert expected == own - arrays
    trainer.log_stats(stats, {"query": ["q"] * 4, "response": ["r"] * 4}, scores)
    logged = trainer.state.log_history[-1]
    generated = trainer.step(
        queries, trainer.generate(queries, return_prompt=False, max_new_tokens=5), scores, **given
    )
    trainer = tiny_trainer(tmp_path, loss_type=loss_type, exact_kl=False)
    known = ALGORITHMS[loss_type].needs_old_logprobs
    at_first_visits = set() if known else {"objective/kl_at_first_visits"}
    assert trainer.step(queries, responses, scores, **given).keys() - stats.keys() == at_first_visits
    differences = generated.keys() - stats.keys()
    assert documented["Only for some responses"] == differences | {"objective/kl_at_first_visits"}
    numbers = logged.keys() - stats.keys() - {"step", "epoch"}
    assert documented["What `log_stats` adds"] == numbers | {"env/reward_dist"}
    assert "env/reward_dist" in reward_statistics(scores, trainer.accelerator)


def test_the_changelog_knows_this_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert re.search(rf"^## \[{re.escape(version)}\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)


def byte_model_config(tokenizer, **sizes):
    return GPTNeoXConfig(vocab_size=len(tokenizer), num_hidden_layers=2, bos_token_id=0, eos_token_id=0, **sizes)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A small language model of bytes, an adapter on it and a reward model, as a user would have them on disk."""
    folder = tmp_path_factory.mktemp("checkpoints")
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 128}
    config = byte_model_config(tokenizer, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    model.half().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    adapted = get_peft_model(base, lora_config(init_lora_weights=False))
    adapted.save_pretrained(folder / "sft-adapter")
    config.num_labels = 1
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "reward-model")
    return folder


def with_paths(script, checkpoints):
    for name in (MODEL_NAME, README_MODEL):
        script = script.replace(f'"{name}"', repr(str(checkpoints / "model")))
    return script.replace('"path/to/', f'"{checkpoints}/')


def test_the_readme_script_learns(tmp_path, monkeypatch, capsys):
    """As it stands but for the model's name, on random weights, wide enough for its learning rate to move them.

    A response of 8 random bytes has 8 * 26 / 257 = 0.8 capital letters, with a standard deviation of 0.9: the mean of
    32 has a standard error of 0.16, and the difference of two steps and one of 0.2. A margin of 0.8 is four of them.
    """
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "num_attention_heads": 4, "intermediate_size": 1024, "max_position_embeddings": 64}
    config = byte_model_config(tokenizer, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (script,) = fenced(ROOT / "README.md", "python")
    assert len(script.splitlines()) <= 40 and script.count(f'"{README_MODEL}"') == 1
    monkeypatch.chdir(tmp_path)
    exec(script.replace(README_MODEL, "model"), {})
    printed = re.findall(r"^score (-?\d+\.\d\d), KL (-?\d+\.\d\d) nats: ", capsys.readouterr().out, flags=re.MULTILINE)
    scores, kls = ([float(number) for number in column] for column in zip(*printed, strict=True))
    assert len(scores) == 6
    assert sum(scores[-2:]) / 2 > scores[0] + 0.8
    assert kls[-1] > abs(kls[0])
    AutoModelForCausalLM.from_pretrained(tmp_path / "capitals")
    assert (tmp_path / "capitals" / "value_model" / "value_head.safetensors").is_file()


@pytest.fixture(scope="module")
def training_page(tmp_path_factory, checkpoints):
    """What the script of the page on training leaves behind, and the folder that it ran in."""
    (script,) = fenced(ROOT / "docs" / "training.md", "python")
    # Fewer and shorter rollouts will do here.
    for option, value in {
        "batch_size=64": 16,
        "max_completion_length=32": 8,
        "max_steps=32": 8,
        "_steps=16": 4,
    }.items():
        script = script.replace(option, f"{option.partition('=')[0]}={value}")
    folder, namespace = tmp_path_factory.mktemp("training"), {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        run_block(script, namespace, checkpoints)
    return namespace, folder


def run_block(block, namespace, checkpoints):
    block = with_paths(block, checkpoints).replace("APAConfig(", "APAConfig(use_cpu=True, ")
    exec(compile(block, "a page", "exec"), namespace)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_the_readme_script_runs_under_the_launchers_of_the_quickstart(tmp_path, checkpoints, launcher):
    """Literally, but for the device; without GPUs accelerate starts one process."""
    (lines,) = [block for block in fenced(ROOT / "docs" / "quickstart.md", "bash") if "torchrun" in block]
    (line,) = [line for line in lines.splitlines() if line.startswith(launcher)]
    (readme,) = fenced(ROOT / "README.md", "python")
    script = with_paths(readme, checkpoints).replace("batch_size=32", "batch_size=16")
    (tmp_path / "script.py").write_text(script.replace("APAConfig(", "APAConfig(use_cpu=True, "))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    program = [
        sys.executable,
        "-m",
        *{"torchrun": ["torch.distributed.run"]}.get(launcher, ["accelerate.commands.launch"]),
    ]
    arguments = shlex.split(line)[1:] if launcher == "torchrun" else shlex.split(line)[2:]
    done = subprocess.run(
        [*program, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    reported = re.findall(r"score (-?\d+\.\d\d), KL (-?\d+\.\d\d) nats", done.stdout)
    assert len(reported) >= (2 if launcher == "torchrun" else 1)
    AutoModelForCausalLM.from_pretrained(tmp_path / "capitals")


def test_the_script_of_the_page_on_training_runs_and_that_on_resuming_goes_on(training_page, checkpoints, monkeypatch):
    namespace, folder = training_page
    monkeypatch.chdir(folder)
    trainer = namespace["trainer"]
    assert [row["step"] for row in trainer.state.log_history if "eval_kl" in row] == [4, 8]
    AutoModelForCausalLM.from_pretrained(folder / "ten-words")
    trainer.args.max_steps = 12
    for block in fenced(ROOT / "docs" / "resuming.md", "python"):
        run_block(block, dict(namespace), checkpoints)
        assert trainer.state.global_step == 12


def test_the_snippets_on_rewards_run(training_page, checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = dict(training_page[0])
    for block in fenced(ROOT / "docs" / "rewards.md", "python"):
        run_block(block, namespace, checkpoints)
    assert namespace["trainer"].scorer.names == ["reward-model", "ten_words", "no_shouting", "each_token_costs"]
    assert namespace["stats"]["apa/mean_scores"] == pytest.approx(float(sum(namespace["scores"])) / 64, rel=1e-4)


def test_the_snippets_on_generation_run(training_page, checkpoints, tmp_path, monkeypatch):
    """Those on vLLM with a stand-in for it, up to its engine's options."""
    monkeypatch.chdir(tmp_path)
    namespace = dict(training_page[0])
    sampled, colocated, served = fenced(ROOT / "docs" / "generation.md", "python")
    run_block(sampled, namespace, checkpoints)
    rollouts = namespace["trainer"].run_state.iteration.rollouts
    assert len(rollouts) == 16 and len({tuple(query.tolist()) for query in rollouts.queries[:4]}) == 1
    assert list((tmp_path / "sentences" / "completions").iterdir())
    install(monkeypatch)
    run_block(colocated, namespace, checkpoints)
    trainer = trl_apa.APATrainer(namespace["config"], namespace["model"], tokenizer=namespace["tokenizer"])
    assert trainer.vllm.engine.llm.options["enable_sleep_mode"] and trainer.vllm.engine.max_model_length == 512
    run_block(served, namespace, checkpoints)
    assert (namespace["config"].vllm_mode, namespace["config"].use_vllm) == ("server", True)


def test_the_script_of_the_page_on_offline_learning_runs(tmp_path, checkpoints, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompts = [f"\n\nHuman: {number}?\n\nAssistant:" for number in range(20)]
    rows = [{"chosen": f"{prompt} Yes.", "rejected": f"{prompt} I do not know."} for prompt in prompts]
    (tmp_path / "preferences.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    (script,) = fenced(ROOT / "docs" / "offline.md", "python")
    script = script.replace("OfflineConfig(\n", "OfflineConfig(\n    use_cpu=True,\n")
    namespace = {}
    exec(compile(with_paths(script, checkpoints), "offline.md", "exec"), namespace)
    rewards = [row["eval_reward"] for row in namespace["trainer"].state.log_history if "eval_reward" in row]
    assert 2 <= len(rewards) <= 3
    AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "awr")


def test_the_quickstart_continues_the_readme_script(tmp_path, checkpoints, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (readme,) = fenced(ROOT / "README.md", "python")
    namespace = {}
    run_block(readme.partition("trainer = ")[0], namespace, checkpoints)
    blocks = fenced(ROOT / "docs" / "quickstart.md", "python")
    assert len(blocks) == 6
    references, trainers = [], []
    for block in blocks:
        run_block(block, namespace, checkpoints)
        trainers.append(namespace["trainer"])
        references.append(namespace["trainer"].ref_model)
    lora, one_base, sft_adapter, reward_model, loaded, _ = references
    assert one_base is None and trainers[1].model.base_is_shared and trainers[1].model.policy.is_loaded_in_8bit
    assert namespace["config"].report_to == ["wandb", "tensorboard"]
    assert lora is None and sft_adapter is None and reward_model is not None and loaded is not None
    assert namespace["stats"]["tokens/counted"] > 0
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "aligned")
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), namespace["policy"].parameters(), strict=True))


CLASSIC_LOOP = """
model = AutoModelForCausalLMWithValueHead.from_pretrained({model!r})
config = PPOConfig(learning_rate=1e-3, batch_size=8, mini_batch_size=2, gradient_accumulation_steps=2, ppo_epochs=3)
ppo_trainer = PPOTrainer(config, model, None, tokenizer, dataset=dataset, data_collator=collator)
generation_kwargs = {{"top_k": 0.0, "top_p": 1.0, "do_sample": True, "max_new_tokens": 4}}
generation_kwargs["pad_token_id"] = tokenizer.eos_token_id
for batch in ppo_trainer.dataloader:
    response_tensors = ppo_trainer.generate(batch["input_ids"], return_prompt=False, **generation_kwargs)
    batch["response"] = tokenizer.batch_decode(response_tensors)
    rewards = [torch.tensor(float(len(text))) for text in batch["response"]]
    stats = ppo_trainer.step(batch["input_ids"], response_tensors, rewards)
    ppo_trainer.log_stats(stats, batch, rewards)
ppo_trainer.save_pretrained("my_ppo_model")
"""


def test_the_new_imports_run_a_classic_loop(tmp_path, checkpoints, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (diff,) = fenced(ROOT / "README.md", "diff")
    imports = [line[1:] for line in diff.splitlines() if line.startswith("+")]
    assert len(imports) == 1 and " import " in imports[0]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoints / "model")
    rows = [{"input_ids": torch.tensor(tokenizer(f"question {i}")["input_ids"]), "query": f"{i}"} for i in range(16)]
    namespace = {
        "torch": torch,
        "tokenizer": tokenizer,
        "dataset": rows,
        "collator": lambda data: {key: [row[key] for row in data] for key in data[0]},
    }
    exec("\n".join(imports) + CLASSIC_LOOP.format(model=str(checkpoints / "model")), namespace)
    assert namespace["stats"]["apa/mean_scores"] > 0
    assert (tmp_path / "my_ppo_model" / "model.safetensors").is_file()
    with pytest.raises(TypeError, match="no_such_option"):
        namespace["PPOConfig"](no_such_option=1)
