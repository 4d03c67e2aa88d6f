"""Warnings of libraries that a command does not show: each by the very warning, beside a similar one that is shown."""

import logging
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from bitsandbytes.autograd import _functions as eight_bit
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPTNeoXConfig, TrainingArguments

from tests._cli import run
from tests.test_cli import hh_rows, jsonl, make_model
from trl_apa.commands.quiet import LOGGED, WARNINGS, without_known_warnings, without_report_of_new_head


def deprecated_option(tmp_path):
    TrainingArguments(str(tmp_path), use_cpu=True, gradient_checkpointing=True)


def deprecated_property(tmp_path):
    _ = AutoModelForCausalLM.from_config(GPTNeoXConfig(**SIZES)).is_gradient_checkpointing


def pinned_memory(tmp_path):
    list(torch.utils.data.DataLoader([1, 2], pin_memory=True))


SIZES = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
# By the module that warns: what makes it do so.
RAISED = {
    "transformers.training_args": deprecated_option,
    "transformers.modeling_utils": deprecated_property,
    "torch.utils.data.dataloader": pinned_memory,
}
OF_LOADING = "transformers.modeling_utils"
RENAMED = {"transformers.training_args", "transformers.modeling_utils"}
SIMILAR = {
    "transformers.training_args": "`gradient_checkpointing_kwargs` is deprecated and will be removed in v6. "
    "Use `activation_checkpointing_kwargs` instead.",
    "transformers.modeling_utils": "`is_something` is deprecated and will be removed in v6. "
    "Use `is_activation_checkpointing` instead.",
    "torch.utils.data.dataloader": "'pin_memory' argument is set as true but not supported on MPS now, device pinned "
    "memory won't be used.",
}


def seen(function):
    """The texts of the warnings that a call shows."""
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        function()
    return [str(warning.message) for warning in shown]


def warned_from(place, text):
    """As if `text` was warned of in the module `place`."""
    warnings.warn_explicit(text, FutureWarning, f"{place}.py", 1, module=place)


def quietly(function):
    def called():
        with without_known_warnings():
            function()

    return called


def test_each_hidden_warning_has_its_test():
    assert {hidden.place for hidden in WARNINGS} == RAISED.keys() == SIMILAR.keys()
    assert {hidden.place for hidden in LOGGED} == {
        "bitsandbytes.backends.cpu.ops",
        "bitsandbytes.autograd._functions",
    }


@pytest.mark.parametrize("place", RAISED)
def test_the_very_warning_is_hidden_and_one_like_it_is_shown(tmp_path, place):
    if place == "torch.utils.data.dataloader" and torch.accelerator.is_available():
        pytest.skip("memory is pinned for an accelerator")
    if place in RENAMED and "activation_checkpointing" not in TrainingArguments.__dataclass_fields__:
        pytest.skip("this version of transformers has not renamed it")
    (told,) = seen(lambda: RAISED[place](tmp_path))
    assert seen(quietly(lambda: RAISED[place](tmp_path))) == []
    # From another module, or with another text, it is shown; afterwards it is shown again.
    assert seen(quietly(lambda: warned_from("my_module", told))) == [told]
    assert seen(quietly(lambda: warned_from(place, SIMILAR[place]))) == [SIMILAR[place]]
    assert seen(quietly(lambda: warned_from(place, f"{told} And more."))) == [f"{told} And more."]
    assert seen(lambda: RAISED[place](tmp_path)) == [told]


class Kept(logging.Handler):
    def __init__(self):
        super().__init__()
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


@pytest.fixture
def kept():
    """What is logged on the loggers of libraries."""
    handler = Kept()
    loggers = [logging.getLogger(place) for place in (*(hidden.place for hidden in LOGGED), OF_LOADING)]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.WARNING)
    yield handler
    for logger, level in zip(loggers, levels, strict=True):
        logger.removeHandler(handler)
        logger.setLevel(level)


@pytest.mark.skipif(not hasattr(eight_bit, "logger"), reason="this version of bitsandbytes does not log it")
def test_the_cast_before_8_bit_products_is_hidden(kept, monkeypatch):
    def product():
        weight = torch.zeros(2, 4, dtype=torch.int8)
        state = eight_bit.MatmulLtState(CB=weight, SCB=torch.ones(2))
        state.has_fp16_weights, state.is_training = False, False
        eight_bit.matmul(torch.ones(1, 4), weight, state=state)
        eight_bit.logger.warning("MatMul8bitLt: something else")

    monkeypatch.setattr(eight_bit, "logger", logging.getLogger("bitsandbytes.autograd._functions"))
    product()
    assert len(kept.texts) == 2 and "inputs will be cast from torch.float32 to float16" in kept.texts[0]
    kept.texts.clear()
    quietly(product)()
    assert kept.texts == ["MatMul8bitLt: something else"]


def test_the_missing_4_bit_kernel_is_hidden(kept):
    """bitsandbytes says so once, where the processor has AVX512-BF16: said here as it says it."""
    source = Path(sys.modules["bitsandbytes"].__file__).parent / "backends" / "cpu" / "ops.py"
    text = "Failed to load CPU gemm_4bit_forward from kernels-community: %s."
    assert text in source.read_text()
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")

    def said():
        logger.warning(text + " Please make sure", "no kernels")
        logger.warning("Failed to load CPU int8 from kernels-community")

    said()
    assert len(kept.texts) == 2
    kept.texts.clear()
    quietly(said)()
    assert kept.texts == ["Failed to load CPU int8 from kernels-community"]


def test_the_new_head_of_a_reward_model_is_hidden_and_other_new_weights_are_shown(tmp_path, kept, monkeypatch):
    monkeypatch.setattr(transformers.modeling_utils.logger, "propagate", False)
    AutoModelForCausalLM.from_config(GPTNeoXConfig(**SIZES, tie_word_embeddings=False)).save_pretrained(tmp_path)

    def load(**options):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1, **options)

    load()
    assert len(kept.texts) == 1 and "score.weight" in kept.texts[0] and "embed_out.weight" in kept.texts[0]
    kept.texts.clear()
    with without_report_of_new_head():
        load()
    assert kept.texts == []
    with without_report_of_new_head():
        load(num_hidden_layers=2)
    assert len(kept.texts) == 1 and "gpt_neox.layers.1" in kept.texts[0].replace("{0, 1}", "1")
    # A reward function that loads one to score with it would score by a random head: that is said in every command.
    kept.texts.clear()
    quietly(load)()
    assert len(kept.texts) == 1 and "score.weight" in kept.texts[0]


def test_importing_the_package_hides_nothing():
    script = "import logging, warnings; before = list(warnings.filters); import trl_apa.cli, trl_apa.commands.train; "
    script += "from trl_apa.commands.quiet import LOGGED; "
    script += "print([h.place for h in LOGGED if logging.getLogger(h.place).filters])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


COMMANDS = {
    "sft": "--max_steps 1",
    "reward": "--max_steps 1",
    "offline": "--reward_funcs quiet_rewards.brevity --max_steps 1 --max_completion_length 4",
    "train": "--reward_funcs quiet_rewards.brevity --max_steps 1 --max_completion_length 4 --batch_size 8 "
    "--gradient_checkpointing true",
    "generate": "--max_completion_length 4 --output answers.jsonl",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quiet")
    make_model(folder / "model")
    jsonl(folder / "rows.jsonl", hh_rows(12))
    (folder / "quiet_rewards.py").write_text(
        "def brevity(completions, **columns):\n    return [-len(text) for text in completions]\n"
    )
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_runs_on_a_cpu_without_more_options_and_no_library_warns(folder, monkeypatch, command, capsys):
    """As on a machine without a GPU, with the options that a run cannot do without."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("trl_apa.config.precision.is_torch_bf16_gpu_available", lambda: False)
    options = f"--model_name_or_path model --dataset_name rows.jsonl {COMMANDS[command]}".split()
    options += [] if command == "generate" else ["--output_dir", f"out-{command}"]
    logged = Kept()
    logged.setLevel(logging.WARNING)
    logging.getLogger("transformers").addHandler(logged)
    try:
        shown = seen(lambda: run(command, *options))
    finally:
        logging.getLogger("transformers").removeHandler(logged)
    assert "unexpected" not in (told := capsys.readouterr().err), told
    assert (folder / ("answers.jsonl" if command == "generate" else f"out-{command}/trainer_state.json")).is_file()
    libraries = [text for text in shown if "deprecated" in text or "pin_memory" in text]
    assert libraries == [] and [text for text in logged.texts if "deprecated" in text] == []
