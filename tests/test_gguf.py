"""Models from GGUF files: unpacked by transformers, trained, saved and loaded again as any other."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests._cli import run
from tests.tiny import lora_config, tiny_config
from trl_apa import APATrainer, AutoModelForCausalLMWithValueHead
from trl_apa.checking import memory, saving
from trl_apa.memory.shapes import config_of
from trl_apa.models import ValueModel, load_language_model, load_policy, load_value_model, merge_and_save
from trl_apa.models.gguf import gguf_read_once, gguf_source, load_tokenizer, without_gguf_marks
from trl_apa.offline import OfflineAPATrainer, OfflineConfig


gguf = pytest.importorskip("gguf", reason="GGUF files are read by gguf: pip install 'trl-apa[real]'")

from tests.tiny_gguf import NAME, write_gguf  # noqa: E402


IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("model")).parent


def from_file(folder):
    """As a user loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=NAME)


def tokenizer_of(folder):
    return AutoTokenizer.from_pretrained(folder, gguf_file=NAME)


def trainer_of(tmp_path, folder, model=None, options=None, **config):
    model = from_file(folder) if model is None else model
    options = {"tokenizer": tokenizer_of(folder), **(options or {})}
    config = {"max_completion_length": 4, "steps": 8, **config}
    return APATrainer(tiny_config(tmp_path, **config), model, **options)


def one_step(trainer):
    queries = [torch.tensor([5, 6, 7])] * 4
    responses = trainer.generate(queries, return_prompt=False)
    trainer.step(queries, responses, [torch.tensor(float(i)) for i in range(4)])


def changes_in_one_step(trainer):
    """Whether the policy learns."""
    before = [parameter.detach().clone() for parameter in trainer.model.policy.parameters()]
    one_step(trainer)
    return any(not torch.equal(*pair) for pair in zip(before, trainer.model.policy.parameters(), strict=True))


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits


def test_the_weights_are_those_of_the_file(folder):
    model = load_policy(str(folder / NAME))
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(folder / NAME).tensors}
    for name, parameter in (
        ("token_embd.weight", model.get_input_embeddings().weight),
        ("blk.1.ffn_down.weight", model.model.layers[1].mlp.down_proj.weight),
    ):
        written = gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type)
        torch.testing.assert_close(parameter.detach(), torch.from_numpy(written))
    assert torch.equal(logits(model), logits(from_file(folder)))


def test_a_file_is_parsed_once_for_config_tokenizer_and_weights(folder, monkeypatch):
    parsed, mapped = [], []
    reader, name_map = gguf.GGUFReader, gguf.get_tensor_name_map
    monkeypatch.setattr(gguf, "GGUFReader", lambda *args: parsed.append(args) or reader(*args))
    monkeypatch.setattr(gguf, "get_tensor_name_map", lambda *args: mapped.append(args) or name_map(*args))
    given = gguf.GGUFReader
    with gguf_read_once():
        together = load_tokenizer(folder / NAME), load_policy(str(folder / NAME))
    assert len(parsed) == 1 and len(mapped) == len(set(mapped))
    assert gguf.GGUFReader is given
    alone = load_tokenizer(folder / NAME), load_policy(str(folder / NAME))
    assert len(parsed) >= 3, "outside, each reads the file as it is then"
    assert together[0].get_vocab() == alone[0].get_vocab()
    for mine, theirs in zip(together[1].parameters(), alone[1].parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_reading_once_ends_with_an_error_too(tmp_path):
    given = gguf.GGUFReader, gguf.get_tensor_name_map
    with pytest.raises(OSError), gguf_read_once():
        load_tokenizer(tmp_path / "none.gguf")
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == given


def test_a_full_policy_trains_and_comes_back_by_transformers_alone(folder, tmp_path):
    trainer = trainer_of(tmp_path, folder)
    before = logits(from_file(folder))
    one_step(trainer)
    assert not torch.equal(before, logits(trainer.model.policy))
    assert torch.equal(before, logits(trainer.ref_model))  # pi_init is the file
    trainer.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), logits(trainer.model.policy)
    )
    saved = str(tmp_path / "saved")
    again = APATrainer(tiny_config(tmp_path, max_completion_length=4), saved, value_model=f"{saved}/value_model")
    one_step(again)


@pytest.mark.parametrize(
    ("made_by", "value_model"),
    [("trainer", "separate"), ("trainer", "head"), ("user", "adapter"), ("load_policy", "separate")],
)
def test_an_adapter_names_a_base_that_peft_loads(folder, tmp_path, value_model, made_by):
    options = {"value_model": value_model}
    if made_by == "trainer":
        model, options["peft_config"] = from_file(folder), lora_config()
    elif made_by == "user":
        model = get_peft_model(from_file(folder), lora_config())
    else:
        model = load_policy(str(folder), lora=4, gguf_file=NAME)
    trainer = trainer_of(tmp_path / "run", folder, model, options)
    one_step(trainer)
    trainer.save_pretrained(tmp_path / "saved")
    trained = logits(trainer.model.policy)
    shutil.move(folder / NAME, tmp_path / NAME)  # the file is needed no more
    try:
        loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved")
        torch.testing.assert_close(logits(loaded), trained)
        torch.testing.assert_close(logits(load_language_model(str(tmp_path / "saved"))), trained)
        for source in (trainer.model.policy, tmp_path / "saved"):
            merge_and_save(source, tmp_path / "merged", trainer.processing_class)
            merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
            torch.testing.assert_close(logits(merged), trained, rtol=1e-4, atol=1e-4)
        if value_model == "separate":
            ValueModel.from_pretrained(tmp_path / "saved" / "value_model")
    finally:
        shutil.move(tmp_path / NAME, folder / NAME)


def test_the_base_is_written_once_and_outlives_the_checkpoints(folder, tmp_path):
    config = {"save_steps": 1, "save_total_limit": 1, "save_strategy": "steps", "max_steps": 3}
    options = {
        "peft_config": lora_config(),
        "train_dataset": ["one", "two", "three", "four"],
        "reward_funcs": lambda completions, **_: [float(len(text)) for text in completions],
    }
    run = tmp_path / "run"
    trainer_of(run, folder, options=options, **config).train()
    bases = list(run.glob("base-*"))
    assert len(bases) == 1
    (checkpoint,) = run.glob("checkpoint-*")
    named = json.loads((checkpoint / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(named) == bases[0]
    AutoPeftModelForCausalLM.from_pretrained(checkpoint)
    written = {file: file.stat().st_mtime_ns for file in bases[0].iterdir()}
    resumed = trainer_of(run, folder, options=options, **{**config, "max_steps": 4})
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert list(run.glob("base-*")) == bases
    assert {file: file.stat().st_mtime_ns for file in bases[0].iterdir()} == written


@pytest.mark.slow
def test_a_resumed_run_is_the_one_that_never_stopped(folder, tmp_path):
    def finish(output_dir, options, max_steps, **kwargs):
        options = {
            **options,
            "train_dataset": ["one", "two", "three", "four"],
            "reward_funcs": lambda completions, **_: [float(len(text)) for text in completions],
        }
        config = {"save_steps": 1, "save_strategy": "steps", "max_steps": max_steps, "lr_scheduler_type": "constant"}
        trainer = trainer_of(output_dir, folder, options=options, **config)
        trainer.train(**kwargs)
        return logits(trainer.model.policy)

    for name, options in (("full", {}), ("lora", {"peft_config": lora_config(), "value_model": "adapter"})):
        whole = finish(tmp_path / f"{name}-whole", options, 3)
        finish(tmp_path / name, options, 1)
        assert torch.equal(finish(tmp_path / name, options, 3, resume_from_checkpoint=True), whole)


@pytest.mark.slow
def test_every_network_may_come_from_a_file(folder, tmp_path):
    networks = {"ref_model": from_file(folder), "value_model": from_file(folder)}
    assert changes_in_one_step(trainer_of(tmp_path, folder, options=networks))
    path = str(folder / NAME)
    assert changes_in_one_step(
        APATrainer(tiny_config(tmp_path, max_completion_length=4), path, ref_model=path, value_model=path)
    )
    assert changes_in_one_step(trainer_of(tmp_path, folder, options={"value_model": load_value_model(path, lora=2)}))
    wrapper = AutoModelForCausalLMWithValueHead.from_pretrained(folder, gguf_file=NAME, peft_config=lora_config())
    wrapper.save_pretrained(tmp_path / "wrapped")
    again = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "wrapped")
    assert torch.equal(logits(again.pretrained_model), logits(wrapper.pretrained_model))
    given = AutoModelForCausalLMWithValueHead.from_pretrained(from_file(folder), peft_config=lora_config())
    assert changes_in_one_step(trainer_of(tmp_path, folder, given))
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, gguf_file=NAME, num_labels=1)
    assert changes_in_one_step(trainer_of(tmp_path, folder, options={"value_model": classifier}))


def test_offline_training_takes_it_too(folder, tmp_path):
    config = OfflineConfig(output_dir=str(tmp_path), max_steps=1, use_cpu=True, report_to="none")
    rows = [{"prompt": "one", "completion": " two", "reward": float(i)} for i in range(8)]
    trainer = OfflineAPATrainer(
        model=from_file(folder),
        args=config,
        train_dataset=rows,
        processing_class=tokenizer_of(folder),
        peft_config=lora_config(),
    )
    trainer.train()
    trainer.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(
        logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved")), logits(trainer.model.policy)
    )


def test_a_file_is_named_as_a_model_is(folder):
    assert gguf_source("org/model") == ("org/model", {})
    assert gguf_source("org/model/tiny.gguf") == ("org/model", {"gguf_file": "tiny.gguf"})
    assert gguf_source("tiny.gguf") == (".", {"gguf_file": "tiny.gguf"})
    assert load_tokenizer(folder / NAME)("hello") == tokenizer_of(folder)("hello")
    assert config_of(str(folder / NAME)).hidden_size == 32
    assert gguf_source(folder) == (str(folder), {"gguf_file": NAME})


def test_a_folder_with_a_checkpoint_or_several_files_is_taken_as_it_is(tmp_path):
    (tmp_path / "one.gguf").touch()
    for name in ("config.json", "adapter_config.json", "two.gguf"):
        (tmp_path / name).touch()
        assert gguf_source(tmp_path) == (str(tmp_path), {})
        (tmp_path / name).unlink()


def test_commands_take_a_file_and_what_was_trained_on_one(folder, tmp_path, capsys):
    path, small = str(folder / NAME), ("--max_completion_length", 3, "--use_cpu")
    assert run("generate", "--model_name_or_path", path, "--prompt", "hi", *small) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "hi"
    trainer = trainer_of(tmp_path / "run", folder, options={"peft_config": lora_config()})
    trainer.save_pretrained(tmp_path / "saved")
    assert run("merge", tmp_path / "saved", "--output_dir", tmp_path / "merged") == 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


def test_weights_that_are_still_packed_stay_refused(folder, tmp_path):
    model = from_file(folder)
    if not getattr(model, "is_quantized", False):
        pytest.skip("this version of transformers keeps no weights packed")
    packed = torch.nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
    model.model.layers[0].mlp.down_proj.register_parameter("blocks", packed)
    assert without_gguf_marks(model) is model
    with pytest.raises(ValueError, match="model is quantised"):
        trainer_of(tmp_path, folder, model)


def test_plain_peft_keeps_the_file_as_the_name_of_a_base(folder, tmp_path):
    """Of an adapter that peft itself has saved, this package loads the base again."""
    model = get_peft_model(without_gguf_marks(from_file(folder)), lora_config())
    model.save_pretrained(tmp_path)
    loaded = load_language_model(str(tmp_path))
    assert isinstance(loaded, PeftModel)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.slow
def test_a_file_is_checked_under_its_name(folder, capsys, monkeypatch):
    """Only what depends on where the weights came from, for speed."""
    monkeypatch.setattr("trl_apa.checking.run.CHECKS", (saving.reloaded, memory.weights))
    assert run("check", folder / NAME, "--device", "cpu", "--max_completion_length", 8) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{folder / NAME} on cpu, float32\n") and printed.endswith("nothing is wrong\n")
    for finding in ("saved and resumed", "saved and loaded anew", "memory of the weights"):
        assert f"\nok    {finding} " in printed
