"""Every kind of adapter that is taken trains, is saved, loaded and merged as it is; every other is refused at once."""

import copy

import numpy as np
import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen3MoeConfig

from tests.fake_vllm import install
from tests.tiny import (
    CONFIGS,
    LAYERS,
    SHARED,
    VOCABULARY,
    lora_config,
    tiny_config,
    tiny_model,
    tiny_rollouts,
    tiny_tokenizer,
)
from trl_apa import APATrainer
from trl_apa.models import merged_parameters
from trl_apa.rollout.vllm_generation import check_vllm_can_hold


def tied():
    config = CONFIGS["llama"]()
    config.tie_word_embeddings = True
    return scaled(AutoModelForCausalLM.from_config(config))


def experts():
    """Those of a layer are one tensor each for two of their matrices."""
    sizes = {"intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 8, "moe_intermediate_size": 16}
    config = Qwen3MoeConfig(**SHARED, **LAYERS, **sizes, num_experts=4, num_experts_per_tok=2)
    return scaled(AutoModelForCausalLM.from_config(config))


def scaled(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def of(name, **options):
    return getattr(peft, name)(**{"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options})


ENDS = ["embed_tokens", "lm_head"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# Name -> the base, and what is put on it.
TAKEN = {
    "dora": (tiny_model, lambda: lora_config(use_dora=True)),
    "pissa": (tiny_model, lambda: lora_config(init_lora_weights="pissa")),
    "lora_bias": (lambda: tiny_model("gpt2"), lambda: lora_config(lora_bias=True)),
    "ends saved": (tiny_model, lambda: lora_config(target_modules=["q_proj"], modules_to_save=ENDS)),
    "tied end saved": (tied, lambda: lora_config(target_modules=["q_proj"], modules_to_save=["embed_tokens"])),
    "ends": (tiny_model, lambda: lora_config(target_modules=[*ENDS, "q_proj"])),
    "tied embedding": (tied, lambda: lora_config(target_modules=["embed_tokens", "q_proj"])),
    "positions": (lambda: tiny_model("gpt2"), lambda: lora_config(target_modules=["wte", "wpe", "c_attn"])),
    "rows": (tiny_model, lambda: lora_config(target_modules=["q_proj"], trainable_token_indices=[3, 4])),
    "tied rows": (tied, lambda: lora_config(target_modules=["q_proj"], trainable_token_indices=[3, 4])),
    "all-linear of experts": (experts, lora_config),
    "experts": (experts, lambda: lora_config(target_modules=["q_proj"], target_parameters=EXPERTS)),
    "ia3": (tiny_model, lambda: of("IA3Config", feedforward_modules=[])),
    "oft": (tiny_model, lambda: of("OFTConfig", r=0, oft_block_size=4)),
    "loha": (tiny_model, lambda: of("LoHaConfig", r=4)),
    "fourierft": (tiny_model, lambda: of("FourierFTConfig", n_frequency=8)),
    "trainable tokens": (tiny_model, lambda: peft.TrainableTokensConfig(token_indices=[3, 4], task_type="CAUSAL_LM")),
}
# Not in vLLM, which is told so: rows of an embedding, and two weights where it has one.
NOT_IN_VLLM = ("rows", "tied rows", "tied end saved", "tied embedding", "positions")


def logprobs(model):
    """Of the rollouts' tokens, each row by itself through the model's own forward."""
    queries, responses, _ = tiny_rollouts()
    rows = []
    with torch.no_grad():
        for query, response in zip(queries, responses, strict=True):
            tokens = torch.cat([query, response])[None]
            predicted = model(input_ids=tokens).logits[0, len(query) - 1 : -1].float().log_softmax(-1)
            rows.append(predicted.gather(-1, response[:, None])[:, 0])
    return torch.cat(rows)


def counted(stats, name):
    _, responses, _ = tiny_rollouts()
    return torch.cat([torch.tensor(row[: len(r)]) for row, r in zip(stats[name], responses, strict=True)])


@pytest.mark.parametrize("kind", TAKEN)
def test_a_kind_that_is_taken_starts_at_the_reference_and_comes_back_saved_and_merged(tmp_path, kind):
    make_base, make_config = TAKEN[kind]
    torch.manual_seed(0)
    make_base().save_pretrained(tmp_path / "base")

    def base():
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)

    options = {"peft_config": make_config(), "value_model": "head"}
    trainer = APATrainer(tiny_config(tmp_path, learning_rate=3e-2), base(), tokenizer=tiny_tokenizer(), **options)
    before = logprobs(copy.deepcopy(trainer.model.policy))
    stats = trainer.step(*tiny_rollouts())
    assert torch.equal(counted(stats, "objective/logprobs"), counted(stats, "objective/ref_logprobs"))
    torch.testing.assert_close(counted(stats, "objective/logprobs"), before, rtol=1e-4, atol=1e-4)
    again = trainer.step(*tiny_rollouts())
    assert torch.equal(counted(again, "objective/ref_logprobs"), counted(stats, "objective/ref_logprobs"))

    policy, learned = trainer.model.policy, logprobs(trainer.model.policy)
    assert float((learned - before).abs().max()) > 1e-4
    trainer.save_pretrained(tmp_path / "saved")
    trainer.merge_and_save(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logprobs(merged), learned, rtol=1e-4, atol=1e-4)
    if kind != "pissa":  # which changes the base that it is loaded on
        loaded = PeftModel.from_pretrained(base(), tmp_path / "saved")
        torch.testing.assert_close(logprobs(loaded), learned, rtol=1e-5, atol=1e-5)
    if kind not in NOT_IN_VLLM:
        plain = base()
        names = dict(merged_parameters(policy))
        assert names.keys() == dict(plain.named_parameters()).keys()
        plain.load_state_dict(names, strict=False)
        torch.testing.assert_close(logprobs(plain), learned, rtol=1e-4, atol=1e-4)
    assert torch.equal(logprobs(policy), learned)


@pytest.mark.parametrize("kind", ["ends", "tied rows", "ends saved"])
@pytest.mark.parametrize("value_model", ["separate", "adapter"])
def test_adapters_on_embeddings_go_with_each_kind_of_value_model_and_ids_are_checked(tmp_path, kind, value_model):
    make_base, make_config = TAKEN[kind]
    options = {"peft_config": make_config(), "value_model": value_model}
    trainer = APATrainer(tiny_config(tmp_path), make_base(), tokenizer=tiny_tokenizer(), **options)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    queries, responses, scores = tiny_rollouts()
    assert trainer.step(queries, responses, scores)["objective/kl"] == 0
    for _ in range(2):
        trainer.step(queries, responses, scores)
    moved = {name for name, parameter in trainer.model.named_parameters() if not parameter.equal(before[name])}
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert moved == trained and any("embed_tokens" in name for name in moved if name.startswith("policy"))
    unknown = torch.tensor([3, VOCABULARY])
    for call in (
        lambda: trainer.generate([unknown]),
        lambda: trainer.step([unknown, *queries[1:]], responses, scores),
        lambda: trainer.step(queries, [unknown, *responses[1:]], scores),
    ):
        with pytest.raises(ValueError, match="holds token ids from 3 to 32; the model knows 0 to 31"):
            call()


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (lambda: of("AdaLoraConfig", r=4, target_r=2, total_step=9), "ADALORA adapters are not supported: .*ranks"),
        (lambda: of("PolyConfig", r=4, n_tasks=2), "POLY adapters are not supported: .*task"),
        (lambda: peft.XLoraConfig(hidden_size=16, adapters={}), "XLORA adapters are not supported"),
        (lambda: peft.AdaptionPromptConfig(adapter_len=2, adapter_layers=1), "ADAPTION_PROMPT adapters are not supp"),
        (lambda: peft.PrefixTuningConfig(num_virtual_tokens=2), "PREFIX_TUNING adapters are not supported"),
        (lambda: lora_config(lora_bias=True), r"LORA adapter on .*q_proj cannot be merged into its base: .*has none"),
        (lambda: lora_config(layer_replication=[[0, 2], [1, 2]]), "replicated layers share weights"),
    ],
)
def test_a_kind_that_cannot_work_is_refused_at_construction(tmp_path, config, problem):
    model = tiny_model()
    with pytest.raises(ValueError, match=problem):
        APATrainer(tiny_config(tmp_path), model, tokenizer=tiny_tokenizer(), peft_config=config())


def test_a_bias_that_a_quantised_base_lacks_is_refused_at_construction(tmp_path):
    """Merging loads the base anew, when the run is over."""
    pytest.importorskip("bitsandbytes")
    tiny_model().save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(load_in_4bit=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization)
    options = {"tokenizer": tiny_tokenizer(), "peft_config": lora_config(lora_bias=True)}
    with pytest.raises(ValueError, match=r"LORA adapter on .*_proj cannot be merged into its base: lora_bias=True"):
        APATrainer(tiny_config(tmp_path), model, **options)


@pytest.mark.parametrize("value_model", ["separate", "adapter"])
def test_adapters_on_experts_go_with_each_kind_of_value_model(tmp_path, value_model):
    options = {"peft_config": TAKEN["experts"][1](), "value_model": value_model}
    trainer = APATrainer(tiny_config(tmp_path), experts(), tokenizer=tiny_tokenizer(), **options)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    stats = [trainer.step(*tiny_rollouts()) for _ in range(3)]
    assert stats[0]["objective/kl"] == 0 and stats[-1]["objective/kl"] != 0
    assert np.array_equal(stats[0]["objective/ref_logprobs"], stats[-1]["objective/ref_logprobs"])
    moved = {name for name, parameter in trainer.model.named_parameters() if not parameter.equal(before[name])}
    assert moved == {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    of_experts = {name.partition(".")[0] for name in moved if ".experts." in name}
    assert of_experts == ({"policy", "value_model"} if value_model == "separate" else {"policy"})


def test_tied_adapters_that_share_memory_are_refused(tmp_path):
    config = lora_config(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    with pytest.raises(ValueError, match=r"embed_tokens.* and .*lm_head.* share memory, so every update"):
        APATrainer(tiny_config(tmp_path), tied(), tokenizer=tiny_tokenizer(), peft_config=config)


def test_adapters_that_do_not_compute_are_refused_with_the_reason(tmp_path):
    policy = get_peft_model(tiny_model(), lora_config())
    layer = policy.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_A["default"].weight.data = torch.randn(4, 5)
    with pytest.raises(ValueError, match=r"LORA adapter on .*self_attn\.q_proj cannot be merged"):
        APATrainer(tiny_config(tmp_path), policy, tokenizer=tiny_tokenizer())


def test_the_value_model_of_a_trained_row_keeps_the_reference_where_it_started(tmp_path):
    """An SFT adapter that changed rows of the embedding alone is no identity."""
    policy = get_peft_model(tiny_model(), TAKEN["rows"][1]())
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.mul_(1.5)
    start = logprobs(policy)
    trainer = APATrainer(tiny_config(tmp_path), policy, tokenizer=tiny_tokenizer(), value_model="adapter")
    for _ in range(2):
        stats = trainer.step(*tiny_rollouts())
    torch.testing.assert_close(counted(stats, "objective/ref_logprobs"), start, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("adapted", [False, True])
def test_vllm_gets_experts_under_the_names_of_checkpoints(tmp_path, monkeypatch, adapted):
    """It loads from checkpoints, whose experts are three matrices each; in memory those of a layer are two tensors."""
    install(monkeypatch)
    experts().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = TAKEN["experts"][1]() if adapted else None
    options = tiny_config(tmp_path, use_vllm=True, learning_rate=3e-2)
    trainer = APATrainer(options, base, tokenizer=tiny_tokenizer(), peft_config=config, value_model="head")
    for _ in range(2):
        trainer.step(*tiny_rollouts())
    sent = {name: tensor.clone() for name, tensor in trainer.vllm.engine._iter_named_params()}
    trainer.merge_and_save(tmp_path / "merged")
    saved = load_file(tmp_path / "merged" / "model.safetensors")
    assert "model.layers.1.mlp.experts.3.down_proj.weight" in sent
    assert sent.keys() == saved.keys()
    for name, tensor in sent.items():
        torch.testing.assert_close(tensor, saved[name], rtol=1e-5, atol=1e-6)
    before = load_file(tmp_path / "base" / "model.safetensors")
    assert not sent["model.layers.1.mlp.experts.3.down_proj.weight"].equal(
        before["model.layers.1.mlp.experts.3.down_proj.weight"]
    )


@pytest.mark.parametrize("kind", NOT_IN_VLLM)
def test_what_vllm_would_have_as_one_weight_is_refused(kind):
    make_base, make_config = TAKEN[kind]
    with pytest.raises(ValueError, match="use_vllm=True, but the adapter"):
        check_vllm_can_hold(get_peft_model(make_base(), make_config()), "server")
