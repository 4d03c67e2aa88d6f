"""Sampling with vLLM: TRL's own classes over a stand-in for vLLM, compared with sampling by transformers."""

from contextlib import nullcontext

import pytest
import torch
from peft import IA3Config, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig, LlamaConfig

from tests.all_families import small_model
from tests.fake_vllm import Server, install
from tests.test_generation import letter_tokenizer
from tests.test_training import PROMPTS, few_nines, parameters, trainer_for
from tests.test_update import assert_same
from tests.test_value_head import away_from_identity
from tests.tiny import CONFIGS, EOS, lora_config, tiny_config, tiny_model, tiny_rollouts, tiny_tokenizer, tiny_trainer
from trl_apa import APATrainer
from trl_apa.models import merged_parameters
from trl_apa.models.dense import as_in_checkpoints
from trl_apa.rollout.generation import cut_responses
from trl_apa.rollout.stopping import row_criteria
from trl_apa.rollout.vllm_generation import check_vllm_can_hold, vllm_sampling


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def vllm(monkeypatch):
    install(monkeypatch)


@pytest.fixture
def server(monkeypatch, folder):
    server = Server(folder)
    install(monkeypatch, server)
    yield server
    server.close()


def policy_from(folder, adapted=False):
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(1)
    return get_peft_model(model, lora_config(init_lora_weights=False)) if adapted else model


GREEDY = {"top_k": 1, "max_steps": 8, "learning_rate": 0.03, "use_vllm": True}


def ia3_config():
    return IA3Config(target_modules=["q_proj", "v_proj"], feedforward_modules=[], task_type="CAUSAL_LM")


def held_by(trainer):
    """The weights that the stand-in samples from."""
    engine = trainer.vllm.engine
    return dict(engine.llm.network.named_parameters())


@pytest.mark.parametrize(("adapted", "value_model"), [(False, "separate"), (True, "separate"), (True, "adapter")])
def test_training_in_one_process_with_vllm_is_training_with_generate(tmp_path, folder, vllm, adapted, value_model):
    """With one answer to choose from the two must agree: every iteration's samples are those of the current policy."""
    options = {**GREEDY, "value_model": value_model}
    plain = trainer_for(tmp_path, model=policy_from(folder, adapted), **options | {"use_vllm": False})
    plain.train()
    trainer = trainer_for(tmp_path, model=policy_from(folder, adapted), **options)
    base = {name: p.clone() for name, p in trainer.model.policy.named_parameters() if "base_layer" in name}
    trainer.train()
    assert_same(parameters(trainer), parameters(plain), tolerance=1e-30)
    sampled, expected = (made.run_state.iteration.rollouts.responses[0] for made in (trainer, plain))
    assert sampled.tolist() == expected.tolist()
    llm = trainer.vllm.engine.llm
    assert llm.events.count("synced") == 2, "once an iteration"
    # Merging for vLLM has not moved the base by a bit.
    after = dict(trainer.model.policy.named_parameters())
    assert all(after[name].equal(weight) for name, weight in base.items())
    assert llm.options["gpu_memory_utilization"] == 0.3 and llm.options["max_num_seqs"] == 4
    assert llm.options["quantization"] is None and llm.options["trust_remote_code"] is False


def test_training_with_a_server_is_training_with_generate(tmp_path, folder, server):
    """Weights that are packed after the last of them was handed out still have the adapter in them."""
    model = policy_from(folder, adapted=True)
    plain = trainer_for(tmp_path, model=policy_from(folder, adapted=True), **GREEDY | {"use_vllm": False})
    plain.train()
    trainer = trainer_for(tmp_path, model=model, vllm_mode="server", vllm_server_base_url=server.url, **GREEDY)
    trainer.train()
    assert_same(parameters(trainer), parameters(plain), tolerance=1e-30)
    asked = [body for path, body in server.requests if path == "/v1/completions"]
    assert [len(body["prompt"]) for body in asked] == [4, 4]
    assert {(body["top_k"], body["max_tokens"], body["ignore_eos"], *body["stop_token_ids"]) for body in asked} == {
        (1, 5, True, EOS)
    }
    assert [path for path, _ in server.requests][:5] == [
        "/start_weight_update",
        "/update_weights",
        "/finish_weight_update",
        "/reset_prefix_cache",
        "/v1/completions",
    ]


def test_vllms_own_log_probs_are_compared_and_correct_the_advantages(tmp_path, folder, vllm):
    """The stand-in's are the policy's; one that samples from other weights has others, and the KL stays exact."""
    options = {"use_vllm": True, "loss_type": "ppo", "importance_correction": "truncate", "temperature": 1.0}
    queries, _, scores = tiny_rollouts()
    for moved in (False, True):
        trainer = tiny_trainer(tmp_path, policy_from(folder), **options, max_completion_length=5)
        responses = trainer.generate(queries, return_prompt=False)
        if moved:
            llm = trainer.vllm.engine.llm
            torch.nn.init.normal_(llm.network.lm_head.weight, std=0.5)
            responses = trainer.generate(queries, return_prompt=False)
        assert {call.logprobs for call in trainer.vllm.engine.llm.calls} == {0}
        stats = trainer.step(queries, responses, scores)
        difference, weight = stats["sampling/logprob_difference_max"], stats["sampling/importance_weight_max"]
        assert (difference < 1e-4 and abs(weight - 1) < 1e-4) if not moved else (difference > 0.1 and weight <= 3.0)
        assert abs(stats["objective/kl"]) < 1e-4


def test_a_server_without_log_probs_is_as_one_of_which_nothing_is_known(tmp_path, folder, server):
    queries, _, scores = tiny_rollouts()
    options = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": server.url}
    trainer = tiny_trainer(tmp_path, policy_from(folder), max_completion_length=5, **options)
    for server.reports in (False, True):
        stats = trainer.step(queries, trainer.generate(queries, return_prompt=False), scores)
        assert ("sampling/logprob_difference_max" in stats) == server.reports
        assert stats.get("sampling/logprob_difference_max", 0.0) < 1e-4
        assert server.reports or abs(stats["objective/kl"]) < 1e-4


@pytest.mark.parametrize("mode", [None, "raw_logprobs", "processed_logprobs"])
@pytest.mark.parametrize("changed", [{"temperature": 0.5}, {"top_p": 0.9}, {}])
def test_log_probs_of_a_server_count_only_where_they_say_how_it_sampled(tmp_path, folder, server, mode, changed):
    queries, _, _ = tiny_rollouts()
    server.reports, server.logprobs_mode = True, mode
    options = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": server.url, "loss_type": "ppo"}
    options |= {"importance_correction": "truncate", "max_completion_length": 5, **changed}
    trainer = tiny_trainer(tmp_path, policy_from(folder), **options)
    known = not changed or mode == "processed_logprobs"
    with nullcontext() if known else pytest.warns(UserWarning, match="restart it with --logprobs-mode processed"):
        responses = trainer.generate(queries, return_prompt=False)
    noted = [trainer._sampled_logprobs.known(*pair) is not None for pair in zip(queries, responses, strict=True)]
    assert noted == [known] * len(queries)
    assert {call.logprobs for call in server.llm.calls} == {0 if known else None}


def test_a_server_that_fails_is_named_and_what_was_learned_is_saved(tmp_path, folder, server):
    class FailsLater(list):
        def append(self, request):
            super().append(request)
            server.failing = sum(path == "/v1/completions" for path, _ in self) == 2

    server.requests = FailsLater()
    options = {"vllm_mode": "server", "vllm_server_base_url": server.url}
    trainer = trainer_for(tmp_path, model=policy_from(folder), **GREEDY, **options)
    with pytest.raises(RuntimeError, match=r"(?s)the vLLM server failed: .*out of memory"):
        trainer.train()
    assert (tmp_path / "checkpoint-4" / "trainer_state.json").is_file()


def test_evaluation_samples_the_policy_with_vllm_and_weights_go_over_when_they_have_changed(tmp_path, folder, vllm):
    trainer = trainer_for(tmp_path, model=policy_from(folder), eval_dataset=PROMPTS[:3], **GREEDY)
    metrics = trainer.evaluate()
    llm = trainer.vllm.engine.llm
    assert metrics["eval_kl"] == pytest.approx(0.0, abs=1e-5) and metrics["eval_win_rate"] == 0.5
    query = torch.tensor([5, 6])
    first = trainer.generate([query], return_prompt=False, do_sample=False)[0]
    assert llm.events.count("synced") == 1 and llm.calls[-1].temperature == 0.0
    with torch.no_grad():
        trainer.model.policy.lm_head.weight.mul_(-1)
    second = trainer.generate([query], do_sample=False, max_new_tokens=3)[0]
    assert llm.events.count("synced") == 2 and llm.calls[-1].max_tokens == 3
    assert second[:2].equal(query) and not second[2:].equal(first[:3])
    assert_same(held_by(trainer), dict(trainer.model.policy.named_parameters()), tolerance=1e-30)


def test_memory_that_vllm_gave_back_is_filled_again_before_it_samples(tmp_path, folder, vllm):
    trainer = trainer_for(tmp_path, model=policy_from(folder), vllm_enable_sleep_mode=True, **GREEDY)
    trainer.train()
    events = [event for event in trainer.vllm.engine.llm.events if isinstance(event, tuple) or event == "synced"]
    once = [("wake", "weights"), "synced", ("wake", "kv_cache"), ("sleep", 2)]
    assert events == [("sleep", 2), *once, *once]


def test_responses_end_where_those_of_generate_end(tmp_path, folder, vllm):
    """EOS, a stop string, a limit of each row, pads behind it if asked; a string that begins in the prompt is none."""
    queries = [torch.tensor(ids) for ids in ([5, 6, 7], [9], [12, 4], [20, 21])]
    by_vllm, plain = (
        APATrainer(tiny_config(tmp_path, use_vllm=use), policy_from(folder), tokenizer=letter_tokenizer())
        for use in (True, False)
    )
    words = plain.generate(queries, do_sample=False, eos_token_id=99, max_new_tokens=6)
    crossing = letter_tokenizer().decode(words[2][1:3])
    for options in (
        {"eos_token_id": int(words[0][5])},
        {"stop_strings": [letter_tokenizer().decode(words[1][3:5]), crossing]},
        {"max_length": 6},
        {"remove_padding": False, "eos_token_id": int(words[0][4])},
    ):
        options = {"do_sample": False, "max_new_tokens": 6, "batch_size": 4, **options}
        if "max_length" in options:
            del options["max_new_tokens"]
        found, expected = by_vllm.generate(queries, **options), plain.generate(queries, **options)
        assert [row.tolist() for row in found] == [row.tolist() for row in expected], options
        if "stop_strings" in options:
            assert len(found[2]) > 3
    sampled = by_vllm.generate(queries, length_sampler=lambda: 2, eos_token_id=99, return_prompt=False)
    assert {len(row) for row in sampled} == {2}


def test_rows_are_cut_at_their_first_end_by_hand():
    tokenizer = letter_tokenizer()
    criteria = row_criteria([EOS], [tokenizer.decode([7, 8])], tokenizer)
    queries = [torch.tensor([5]), torch.tensor([5, 7]), torch.tensor([6])]
    completions = [[3, EOS, 4, EOS], [8, 9], [2, 3, 4, 5, 6]]
    cut = cut_responses(queries, completions, criteria, [9, 9, 3], pad_token_id=EOS)
    # EOS; a string that began in the prompt ends nothing; the row's own limit. Pads are EOS here and end nothing.
    assert [row.tolist() for row in cut] == [[3, EOS], [8, 9], [2, 3, 4]]
    cut = cut_responses(queries, [[7, 8, 9], [8, 9, 7, 8, 2], [3, 7, 7, 8]], criteria, [9, 9, 9], pad_token_id=EOS)
    assert [row.tolist() for row in cut] == [[7, 8], [8, 9, 7, 8], [3, 7, 7, 8]]
    with pytest.raises(ValueError, match="the engine gave no token for row 1"):
        cut_responses(queries[:2], [[3], []], criteria, [9, 9], pad_token_id=0)


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("variant", [{}, {"use_dora": True}, {"lora_bias": True}])
def test_the_merged_weights_are_those_of_one_plain_network_and_the_policy_stays_as_it_is(tmp_path, quantised, variant):
    """A saved module and a second adapter that is not in use among them; bitsandbytes' nf4 on the CPU."""
    folder = str(tmp_path)
    config = {**CONFIGS["llama"]().to_dict(), "hidden_size": 64, "intermediate_size": 64, "head_dim": 32}
    config |= {"attention_bias": True, "mlp_bias": True}
    AutoModelForCausalLM.from_config(LlamaConfig(**config)).save_pretrained(folder)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4") if quantised else None
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.float32)
    options = {"init_lora_weights": False, "modules_to_save": ["embed_tokens"]}
    torch.manual_seed(2)
    policy = get_peft_model(model, lora_config(**options, **variant))
    policy.add_adapter("other", lora_config(**options))
    with torch.no_grad():
        policy.get_input_embeddings().weight.mul_(1.1)
    tokens = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        policy.eval()(tokens)  # for which bitsandbytes lays out the weights anew on the CPU
    plain = AutoModelForCausalLM.from_pretrained(folder)
    merged = dict(merged_parameters(policy))
    assert merged.keys() == dict(plain.named_parameters()).keys()
    plain.load_state_dict(merged)
    with torch.no_grad():
        expected = policy.train()(tokens).logits
        torch.testing.assert_close(plain(tokens).logits, expected, rtol=1e-4, atol=1e-4)
        assert all(tensor.equal(merged[name]) for name, tensor in merged_parameters(policy))
        assert policy(tokens).logits.equal(expected)


@pytest.mark.parametrize(
    "options", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}], ids=["lora", "dora", "pissa"]
)
def test_autocast_rounds_no_merged_weight(options):
    """An engine may ask for the weights where the policy computes in bfloat16."""
    policy = away_from_identity(get_peft_model(tiny_model(), lora_config(**options)))
    expected = dict(merged_parameters(policy))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        merged = dict(merged_parameters(policy))
    assert all(merged[name].equal(tensor) for name, tensor in expected.items())


def test_weights_are_sent_to_vllm_as_they_are_in_a_run_in_bfloat16(tmp_path, folder, vllm):
    model = AutoModelForCausalLM.from_pretrained(folder)
    trainer = trainer_for(tmp_path, model, use_vllm=True, bf16=True, peft_config=lora_config())
    away_from_identity(trainer.model.policy)
    expected = dict(as_in_checkpoints(model, merged_parameters(trainer.model.policy)))
    trainer.generate([torch.tensor([3, 4])])
    network = dict(trainer.vllm.engine.llm.network.named_parameters())
    assert all(network[name].equal(tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "mixtral", "gemma3", "hrm_text"])
def test_vllm_gets_the_names_and_the_tensors_of_a_checkpoint(tmp_path, kind):
    """In memory transformers has other names, one tensor for several of a checkpoint, and several for one."""
    small_model(kind).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert kind == "llama" or saved.keys() != dict(model.named_parameters()).keys()
    for wrap in (lambda: model, lambda: get_peft_model(model, lora_config())):  # an adapter that has learned nothing
        policy = wrap()
        sent = dict(as_in_checkpoints(policy, merged_parameters(policy)))
        assert sent.keys() == saved.keys()
        assert all(tensor.equal(saved[name]) for name, tensor in sent.items())


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_vllm_gets_the_names_of_a_dense_checkpoint_from_a_base_that_was_saved_in_4_bit(tmp_path, kind):
    small_model(kind).save_pretrained(tmp_path / "dense")
    quantization = BitsAndBytesConfig(load_in_4bit=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=quantization)
    model.save_pretrained(tmp_path / "4-bit")
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "4-bit"), lora_config())
    sent = dict(as_in_checkpoints(policy, merged_parameters(policy)))
    saved = load_file(tmp_path / "dense" / "model.safetensors")
    assert {name: tensor.shape for name, tensor in sent.items()} == {name: t.shape for name, t in saved.items()}


# ---- what is refused ----


def test_vllm_that_is_not_there_is_asked_for(tmp_path):
    with pytest.raises(ImportError, match=r"use_vllm=True, but vLLM is not installed: pip install 'trl\[vllm\]'"):
        tiny_config(tmp_path, use_vllm=True)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"vllm_mode": "sever"}, "vllm_mode='sever': it should be one of colocate, server"),
        ({"vllm_gpu_memory_utilization": 30}, "vllm_gpu_memory_utilization=30: it should be above 0 and at most 1"),
        ({"vllm_tensor_parallel_size": 0}, "vllm_tensor_parallel_size=0: it should be greater than 0"),
        ({"vllm_mode": "server", "vllm_enable_sleep_mode": True}, "needs vllm_mode='colocate'"),
    ],
)
def test_options_of_vllm_are_checked(tmp_path, vllm, options, problem):
    with pytest.raises(ValueError, match=problem):
        tiny_config(tmp_path, use_vllm=True, **options)


def test_policies_that_vllm_cannot_hold_are_refused(tmp_path, folder, vllm):
    with pytest.raises(ValueError, match="model is an encoder-decoder"):
        check_vllm_can_hold(tiny_model("t5"), "server")
    int8 = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=int8)
    arguments = {"tokenizer": tiny_tokenizer(), "reward_funcs": few_nines, "train_dataset": PROMPTS}
    with pytest.raises(ValueError, match="model is 8-bit, which vLLM cannot load"):
        APATrainer(tiny_config(tmp_path, use_vllm=True), model, peft_config=lora_config(), **arguments)
    four_bit = BitsAndBytesConfig(load_in_4bit=True)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, quantization_config=four_bit), ia3_config())
    with pytest.raises(ValueError, match="model is 4-bit under IA3 adapters, which cannot be merged; use LoRA"):
        check_vllm_can_hold(adapted, "server")
    with pytest.raises(ValueError, match="has trainable_token_indices"):
        check_vllm_can_hold(get_peft_model(tiny_model(), lora_config(trainable_token_indices=[3])), "server")
    with pytest.raises(ValueError, match="by its folder or hub name, and model has none"):
        trainer_for(tmp_path, model=tiny_model(), use_vllm=True)
    trainer = trainer_for(tmp_path, model=policy_from(folder), vllm_max_model_length=8, **GREEDY)
    with pytest.raises(ValueError, match="vllm_max_model_length=8: a query of 4 tokens and its response of up to 5"):
        trainer.generate([torch.tensor([2, 3, 4, 5])])


def test_sampling_options_are_translated_or_refused():
    config = GenerationConfig(
        do_sample=True, temperature=0.7, top_k=5.0, top_p=0.9, min_length=-1, eos_token_id=[1, 99]
    )
    sampling = vllm_sampling(config, "w3", {}, vocabulary=32)
    assert (sampling["temperature"], sampling["top_k"], sampling["top_p"]) == (0.7, 5, 0.9)
    assert sampling["generation_kwargs"]["stop_token_ids"] == [1] and sampling["generation_kwargs"]["stop"] == ["w3"]
    with pytest.raises(ValueError, match="cannot honour logits_processor, no_repeat_ngram_size of generate") as error:
        vllm_sampling(GenerationConfig(no_repeat_ngram_size=2), None, {"logits_processor": []}, vocabulary=32)
    assert "use_vllm=True" in str(error.value)
