"""`trainer.check()` and `trl-apa check`: green where all is right, red for each fault, and nothing left behind."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from tests.all_families import small_model
from tests.fake_vllm import install
from tests.families import family_model, wrong_behind_its_cache
from tests.made_tokenizers import BRACKETS, CHATML, made_tokenizer
from tests.tiny import (
    byte_tokenizer,
    lora_config,
    tiny_config,
    tiny_model,
    tiny_rollouts,
    tiny_tokenizer,
    tiny_trainer,
)
from trl_apa import APATrainer
from trl_apa.checking import Finding, Report, learning, memory, precision, reading, run, saving, sizes
from trl_apa.checking.reading import LARGEST_MEAN
from trl_apa.cli import main
from trl_apa.models import PolicyAndValue
from trl_apa.models.copying import independent_copy
from trl_apa.rollout.batch import Layout


PROMPTS = ["w2 w3 w4", "w5", "w6 w7 w8 w9 w10 w11"]
SMALL = {"max_completion_length": 8}


def lora():
    return {"peft_config": lora_config(), "value_model": "adapter"}


def wrong(report):
    return [finding.name for finding in report.findings if finding.ok is False]


@pytest.fixture
def only(monkeypatch):
    """Leaves out the checks that are not named, for speed."""
    return lambda *checks: monkeypatch.setattr(run, "CHECKS", checks)


def checked(folder, model=None, trainer_kwargs=None, **options):
    return tiny_trainer(folder, model, trainer_kwargs, **{**SMALL, **options}).check(PROMPTS)


# ---- where all is right ----


def test_without_a_value_model_what_is_there_is_checked(folder, capsys):
    arguments = [folder, "--device", "cpu", "--max_completion_length", "8", "--advantage_estimator", "group"]
    assert main(["check", *arguments, "--json"]) == 0
    names = {finding["name"] for finding in json.loads(capsys.readouterr().out)["findings"]}
    assert not [name for name in names if "value" in name]
    assert {"saved and resumed", "gradient of the policy, split into micro-batches"} < names


@pytest.mark.parametrize(
    ("family", "trainer_kwargs"),
    [
        ("llama", dict),
        pytest.param("llama", lambda: {"peft_config": lora_config()}, marks=pytest.mark.slow),
        pytest.param("gpt2", lora, marks=pytest.mark.slow),
        pytest.param("gpt_neox", lambda: {"value_model": "head"}, marks=pytest.mark.slow),
        pytest.param("t5", dict, marks=pytest.mark.slow),
        ("bart", lambda: {"value_model": "head"}),
    ],
)
def test_nothing_is_wrong_with_families_that_are_exact(tmp_path, family, trainer_kwargs):
    report = checked(tmp_path, tiny_model(family), trainer_kwargs(), gradient_checkpointing=family == "gpt2")
    assert wrong(report) == [] and report.ok
    assert report["log-probs, as trained"].figures["max_nats"] < 1e-4
    assert report["log-probs, sampled with cache"].figures["max_nats"] < 1e-4
    assert report["policy against pi_init, before training"].figures["max_nats"] == 0.0
    assert report["gradient of the policy, split into micro-batches"].figures["relative"] < 1e-5
    assert report["saved and resumed"].figures["max_nats"] == 0.0


@pytest.mark.parametrize(
    "family",
    ["bias in the mask", *(pytest.param(f, marks=pytest.mark.slow) for f in ("longrope", "rwkv", "sampled experts"))],
)
def test_what_is_not_exact_in_a_batch_is_said_and_not_used(tmp_path, family):
    trainer = tiny_trainer(tmp_path, family_model(family), {"value_model": "head"}, **SMALL, max_prompt_length=8)
    report = trainer.check(PROMPTS)
    assert wrong(report) == [] and report["log-probs, as trained"].figures["max_nats"] < 1e-4
    if family in ("longrope", "rwkv"):
        found = report["log-probs, padded"]
        assert found.figures["max_nats"] > 1e-3 and "one by one" in found.advice


@pytest.mark.slow
def test_a_check_leaves_nothing_behind(tmp_path):
    """The step after it is the one that would have been made without it."""
    queries, responses, scores = tiny_rollouts()
    stepped = []
    for check in (False, True):
        trainer = tiny_trainer(tmp_path, tiny_model(), lora(), **SMALL, gradient_checkpointing=True)
        torch.manual_seed(3)
        weights = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        training = [module.training for module in trainer.model.modules()]
        if check:
            assert trainer.check(PROMPTS).ok
        assert all(torch.equal(tensor, weights[name]) for name, tensor in trainer.model.state_dict().items())
        assert [module.training for module in trainer.model.modules()] == training
        assert all(parameter.grad is None for parameter in trainer.model.parameters())
        stats = trainer.step(queries, responses, scores)
        stepped.append((torch.rand(1), stats["apa/loss/total"], trainer.model.state_dict()))
    (drawn, loss, weights), (drawn_too, loss_too, weights_too) = stepped
    assert drawn == drawn_too and loss == loss_too
    assert all(torch.equal(weights[name], weights_too[name]) for name in weights)


def test_after_training_the_distance_to_pi_init_is_no_fault(tmp_path, only):
    only(reading.reference)
    trainer = tiny_trainer(tmp_path, **SMALL)
    trainer.step(*tiny_rollouts())
    report = trainer.check(PROMPTS)
    finding = report["policy against pi_init"]
    assert report.ok and finding.ok is None and finding.figures["max_nats"] > 1e-3


def test_it_is_refused_while_train_runs(tmp_path):
    trainer = tiny_trainer(tmp_path, **SMALL)
    trainer.is_in_train = True
    with pytest.raises(ValueError, match="check\\(\\) was called while train\\(\\) runs"):
        trainer.check()


# ---- where something is wrong ----


def grows_with_the_micro_batch(model):
    """The gradient of a token depends on how many there are beside it."""

    def hook(module, inputs, output):
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * gradient.numel())

    model.lm_head.register_forward_hook(hook)


def other_in_train_mode(trainer):
    module = trainer.model
    module.policy.lm_head.register_forward_hook(lambda layer, inputs, output: output * (1.5 if module.training else 1))


def test_a_cache_that_answers_otherwise_is_said_and_not_used(tmp_path, only):
    only(reading.sampling, reading.greedy)
    trainer = tiny_trainer(tmp_path, **SMALL)
    wrong_behind_its_cache(trainer.model.policy)
    report = trainer.check(PROMPTS)
    found = report["log-probs, sampled with cache"]
    assert found.figures["max_nats"] > 0.1 and "without a cache" in found.advice
    assert report.ok


def test_a_gradient_that_depends_on_the_split_is_found(tmp_path, only):
    only(learning.gradient, reading.reference)
    trainer = tiny_trainer(tmp_path, **SMALL)
    grows_with_the_micro_batch(trainer.model.policy)
    assert wrong(trainer.check(PROMPTS)) == ["gradient of the policy, split into micro-batches"]


def test_a_network_that_does_otherwise_in_train_mode_is_found(tmp_path, only):
    only(reading.modes)
    trainer = tiny_trainer(tmp_path, **SMALL)
    other_in_train_mode(trainer)
    assert "train mode against eval mode" in wrong(trainer.check(PROMPTS))


def test_a_layout_that_does_not_suit_the_network_is_found(tmp_path, monkeypatch, only):
    only(reading.layouts)
    trainer = tiny_trainer(tmp_path, family_model("rwkv"), {"value_model": "head"}, **SMALL)
    monkeypatch.setattr(trainer, "layouts", lambda longest, **options: Layout.PADDED)
    assert {"log-probs, padded", "log-probs, as trained"} <= set(wrong(trainer.check(PROMPTS)))


def test_a_reference_that_is_another_model_is_found(tmp_path, only):
    only(reading.reference, reading.modes)
    report = checked(tmp_path, tiny_model(seed=0), {"ref_model": tiny_model(seed=1)})
    assert wrong(report) == ["policy against pi_init, before training"]


def test_attention_that_is_computed_otherwise_is_found(tmp_path, monkeypatch, only):
    only(reading.attention, reading.reference)
    own = "transformers.models.llama.modeling_llama.eager_attention_forward"
    monkeypatch.setattr(own, lambda module, q, k, v, mask, **kwargs: (v.transpose(1, 2).repeat(1, 1, 2, 1), None))
    assert wrong(checked(tmp_path)) == ["attention, sdpa against eager"]


def test_half_precision_is_measured_and_too_much_of_it_is_found(tmp_path, only, monkeypatch):
    only(precision.half_precision)
    finding = checked(tmp_path, tiny_model(), bf16=True)["half precision against float32"]
    assert finding.ok and 0 < finding.figures["mean_nats"] < LARGEST_MEAN
    # Large weights make large errors; how large depends on the version of torch.
    large = {"scale": 30.0, "dtype": torch.bfloat16}
    mean = checked(tmp_path, tiny_model(**large), lora())["half precision against float32"].figures["mean_nats"]
    assert mean > 2 * finding.figures["mean_nats"]
    monkeypatch.setattr(precision, "LARGEST_MEAN", mean / 2)
    finding = checked(tmp_path, tiny_model(**large), lora())["half precision against float32"]
    assert finding.ok is False and "bfloat16" in finding.advice


def test_a_checkpoint_that_lacks_what_was_trained_is_found(tmp_path, monkeypatch, only):
    only(saving.reloaded, saving.merged)
    own = PolicyAndValue.save_pretrained

    def save(self, path, *args, **kwargs):
        own(self, path, *args, **kwargs)
        file = f"{path}/model.safetensors"
        save_file({name: tensor * 0.9 for name, tensor in load_file(file).items()}, file, {"format": "pt"})

    monkeypatch.setattr(PolicyAndValue, "save_pretrained", save)
    trainer = tiny_trainer(tmp_path, **SMALL)
    weights = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    assert wrong(trainer.check(PROMPTS)) == ["saved and resumed", "saved and loaded anew"]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in trainer.model.state_dict().items())


@pytest.mark.parametrize("trainer_kwargs", [dict, lora, lambda: {"value_model": "head"}])
def test_a_checkpoint_that_lacks_the_value_model_is_found(tmp_path, monkeypatch, trainer_kwargs, only):
    only(saving.reloaded)
    trainer = tiny_trainer(tmp_path, None, trainer_kwargs(), **SMALL)
    monkeypatch.setattr(type(trainer.model.value_model), "load_weights", lambda *args: None)
    assert wrong(trainer.check(PROMPTS)) == ["values, saved and resumed"]


def test_an_adapter_that_is_lost_in_merging_is_found(tmp_path, monkeypatch, only):
    only(saving.reloaded, saving.merged)

    def base_alone(policy, folder):
        independent_copy(policy).unload().save_pretrained(folder)

    monkeypatch.setattr(saving, "merge_and_save", base_alone)
    assert wrong(checked(tmp_path, None, lora())) == ["adapter merged into its base"]


def test_what_is_not_a_number_is_null_in_json():
    report = Report("m", "cpu", (Finding("a", False, "", {"nats": float("nan"), "gap": float("inf"), "rows": 2}),))
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["findings"][0]["figures"] == {
        "nats": None,
        "gap": None,
        "rows": 2,
    }


def test_one_prompt_is_no_batch(tmp_path, only):
    only(reading.greedy, learning.gradient)
    report = tiny_trainer(tmp_path, **SMALL).check(["w2 w3"])
    assert [finding.ok for finding in report.findings] == [None, None]


def test_parts_of_a_composite_model_keep_their_attention(tmp_path, only):
    only(reading.attention)
    model = small_model("gemma3")
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    config = model.config
    before = [config._attn_implementation, config.text_config._attn_implementation]
    tiny_trainer(tmp_path, model, {"value_model": "head"}, **SMALL).check(PROMPTS)
    assert [config._attn_implementation, config.text_config._attn_implementation] == before


@pytest.mark.parametrize("value_model", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_memory_is_predicted_for_the_networks_that_are_there(tmp_path, monkeypatch, value_model, only):
    only(memory.weights, memory.micro_batch)
    monkeypatch.setattr(memory, "SMALL", 4096)
    trainer = tiny_trainer(tmp_path, None, {"value_model": tiny_model(value_model)}, **SMALL)
    assert wrong(trainer.check(PROMPTS)) == []


def test_memory_of_adapters_that_the_planner_does_not_know_is_not_judged(tmp_path, only):
    only(memory.weights)
    options = {"peft_config": lora_config(modules_to_save=["lm_head"])}
    (finding,) = tiny_trainer(tmp_path, None, options, **SMALL).check(PROMPTS).findings
    assert finding.ok is None and "modules_to_save" in finding.measured


def test_a_check_that_fails_is_a_finding_and_ends_nothing(tmp_path, monkeypatch, only):
    only(sizes.positions, memory.weights)

    def fails(*args):
        raise RuntimeError("no kernel\nfor this device")

    monkeypatch.setattr(sizes, "max_positions", fails)
    report = checked(tmp_path)
    assert wrong(report) == ["positions"] and "no kernel for this device" in report["positions"].measured
    assert report["memory of the weights"].ok


def test_a_check_without_enough_memory_says_nothing_of_right_and_wrong(tmp_path, monkeypatch, only):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    only(precision.half_precision, reading.reference)
    monkeypatch.setattr(precision, "independent_copy", full)
    report = checked(tmp_path, tiny_model(dtype=torch.bfloat16), lora())
    assert report.ok and "not enough memory" in report["half precision"].measured


@pytest.mark.parametrize(
    ("template", "eos", "said"),
    [
        (CHATML, "<|im_end|>", None),
        (BRACKETS, "</s>", None),
        (CHATML, "</s>", "no answer that it renders ends with a token that ends a response"),
        ("<s><s>" + CHATML, "<|im_end|>", "it begins with BOS 2 times"),
    ],
)
def test_a_chat_template_is_shown_and_its_faults_are_found(template, eos, said):
    # SmolLM2's BOS is the token that begins each turn.
    bos = "<|im_start|>" if template == CHATML else "<s>"
    tokenizer = made_tokenizer("byte_level", chat_template=template, eos_token=eos, bos_token=bos)
    ends = [tokenizer.eos_token_id]
    subject = SimpleNamespace(tokenizer=tokenizer, args=SimpleNamespace(chat_template_kwargs=None), end_token_ids=ends)
    (finding,) = sizes.chat_template(subject)
    assert finding.ok is (said is None) and (said or "") in finding.advice
    assert "What is it?" in finding.measured
    if template == BRACKETS:
        assert "no header" in finding.advice


@pytest.mark.parametrize("off", [0.0, 1.0])
def test_log_probs_of_vllm_are_compared(tmp_path, monkeypatch, off, only):
    only(reading.vllm)
    install(monkeypatch)
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    trainer = tiny_trainer(tmp_path, model, **SMALL, use_vllm=True, vllm_mode="colocate")
    engine = trainer.vllm.engine.llm
    own = engine.network.forward

    def forward(*args, **kwargs):
        output = own(*args, **kwargs)
        output.logits = output.logits * (1 + off)
        return output

    engine.network.forward = forward
    finding = trainer.check(PROMPTS)["log-probs, vLLM"]
    assert finding.ok is (off == 0.0) and (finding.figures["mean_nats"] < 1e-5) is (off == 0.0)


# ---- the table ----


def test_the_table_says_what_is_wrong_and_what_to_do():
    good = Finding("gradient", True, "1.0e-07 of its norm", {"relative": 1e-7})
    bad = Finding("positions", False, "64", {}, "lower max_prompt_length")
    report = Report("model", "cpu, float32", (good, bad, Finding("merge", None, "no adapter")))
    assert str(report).splitlines() == [
        "model on cpu, float32",
        "",
        "ok    gradient   1.0e-07 of its norm",
        "WRONG positions  64",
        "                 lower max_prompt_length",
        "-     merge      no adapter",
        "",
        "wrong: positions",
    ]
    assert not report.ok and report["merge"].ok is None and "\033[31mWRONG" in report.lines(colour=True)[3]
    with pytest.raises(KeyError):
        report["nothing"]


# ---- the command ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    config = tiny_model().config
    config.vocab_size, config.max_position_embeddings = len(tokenizer), 512
    config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_the_command_prints_a_table_and_says_by_its_status_whether_something_is_wrong(folder, capsys, tmp_path):
    arguments = [folder, "--device", "cpu", "--max_completion_length", "8"]
    assert main(["check", *arguments]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{folder} on cpu, float32\n") and printed.endswith("nothing is wrong\n")
    (tmp_path / "prompts.txt").write_text("One?\n\nTwo, and more?\n")
    arguments += ["--peft", "lora", "--prompts", str(tmp_path / "prompts.txt"), "--json"]
    assert main(["check", *arguments]) == 0
    printed = json.loads(capsys.readouterr().out)
    findings = {finding["name"]: finding for finding in printed["findings"]}
    assert printed["ok"] and findings["adapter merged into its base"]["ok"]
    assert findings["saved and loaded anew"]["figures"]["max_nats"] < 1e-5


def test_its_status_is_1_if_something_is_wrong(folder, capsys, only):
    only(sizes.positions)
    assert main(["check", folder, "--device", "cpu", "--max_completion_length", "600"]) == 1
    assert "\nWRONG positions" in capsys.readouterr().out


def test_a_trainer_that_refuses_the_networks_is_the_finding(folder, capsys):
    assert main(["check", folder, "--device", "cpu", "--value_model", "adapter"]) == 1
    printed = capsys.readouterr().out
    assert "WRONG construction of the trainer" in printed and "adapter" in printed


@pytest.mark.slow
def test_the_command_checks_adapters_on_a_quantised_base(folder, capsys):
    arguments = [
        "--device",
        "cpu",
        "--max_completion_length",
        "8",
        "--quantization",
        "4bit",
        "--value_model",
        "adapter",
    ]
    status = main(["check", folder, *arguments, "--json"])
    findings = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}
    assert status == 0
    assert findings["quantised layers"]["figures"]["quantised"] == 14
    assert findings["saved and loaded anew"]["ok"]
    # Merged into the base that was not quantised: what quantising changes.
    assert findings["adapter merged into its base"]["figures"]["max_nats"] > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "model is not set"),
        (["no/such/folder"], "cannot be loaded"),
        (["FOLDER", "--quantization", "3bit"], "invalid choice"),
    ],
)
def test_mistakes_are_told_in_a_line(folder, capsys, arguments, said):
    arguments = [folder if argument == "FOLDER" else argument for argument in arguments]
    try:
        status = main(["check", *arguments, "--device", "cpu"])
    except SystemExit as ended:
        status = ended.code
    assert status == 2 and said in capsys.readouterr().err


def test_a_tokenizer_without_an_end_is_found(tmp_path, only):
    only(sizes.tokens)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    model = tiny_model()
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    trainer = APATrainer(tiny_config(tmp_path, **SMALL), model, tokenizer=tokenizer)
    finding = trainer.check(PROMPTS)["tokens"]
    assert finding.ok is False and "no token ends a response" in finding.advice
    trainer.args.stop_strings = ["w9"]
    finding = trainer.check(PROMPTS)["tokens"]
    assert finding.ok and "the text 'w9'" in finding.measured


def test_layers_of_a_kind_without_adapters_are_counted():
    policy = nn.Sequential(nn.Linear(2, 2))
    (finding,) = precision.quantised_layers(SimpleNamespace(policy=policy))
    assert finding.ok is None and finding.measured == "none"
