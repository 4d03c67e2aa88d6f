"""Micro-batches without padding and logits in chunks: the numbers are those with padding and with all at once."""

import copy
from contextlib import ExitStack

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    CohereConfig,
    Llama4TextConfig,
    MistralConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.all_families import small_model
from tests.test_training import trainer_for
from tests.test_update import assert_same, learner, parameters_after_step
from tests.tiny import FAMILIES, LAYERS, SHARED, lora_config, tiny_model, tiny_rollouts, tiny_trainer
from trl_apa.models import logprobs
from trl_apa.models.layouts import Layouts, why_not_packed
from trl_apa.models.logprobs import (
    head_logprobs,
    network_inputs,
    policy_outputs,
    response_logprobs,
    trunk_and_head,
)
from trl_apa.models.packed_rows import PackedRow
from trl_apa.models.packing import PER_SEQUENCE, attend_per_sequence, attending_with, let_pack
from trl_apa.models.trials import LONG
from trl_apa.rollout.batch import Layout, Rollouts, pack_tokens, pad_tokens, response_mask


OTHER_FAMILIES = {
    "a window of two tokens": lambda: MistralConfig(
        **SHARED, **LAYERS, intermediate_size=32, num_key_value_heads=1, sliding_window=2
    ),
    "chunks of two tokens": lambda: Llama4TextConfig(
        **SHARED,
        **LAYERS,
        intermediate_size=32,
        intermediate_size_mlp=32,
        num_key_value_heads=1,
        head_dim=8,
        num_local_experts=2,
        attention_chunk_size=2,
    ),
    "scaled logits": lambda: CohereConfig(
        **SHARED, **LAYERS, intermediate_size=32, num_key_value_heads=1, logit_scale=0.5
    ),
}


def other_model(family):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(OTHER_FAMILIES[family]())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_without_padding_is_the_padded_one(tmp_path, family):
    """Both in micro-batches of two, which the padded one takes in order of length."""
    results = []
    for padding_free in (True, False):
        model = tiny_model(family, dtype=torch.float64)
        options = {"mini_batch_size": 2, "gradient_accumulation_steps": 2, "padding_free": padding_free}
        trainer = learner(tmp_path, model, ppo_epochs=2, **options)
        trainer.model.value_model.head.double()
        assert trainer._packed is padding_free
        results.append(parameters_after_step(trainer, *tiny_rollouts()))
    assert_same(*results, tolerance=1e-8)


@pytest.mark.parametrize("value_model", ["separate", "adapter", "head"])
def test_with_adapters_and_gradient_checkpointing_too(tmp_path, value_model):
    """The layers that the backward pass runs again must attend as they did in the forward pass."""
    results = []
    for padding_free in (True, False):
        kwargs = {"peft_config": lora_config(), "value_model": value_model}
        trainer = tiny_trainer(
            tmp_path, None, kwargs, padding_free=padding_free, gradient_checkpointing=padding_free, optim="sgd"
        )
        torch.manual_seed(1)
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name or "value_model.head.out" in name:
                torch.nn.init.normal_(parameter)
        results.append(parameters_after_step(trainer, *tiny_rollouts()))
    assert_same(*results)


def test_packing_is_the_default_where_it_is_exact_and_padding_elsewhere(tmp_path):
    assert tiny_trainer(tmp_path)._packed
    assert not tiny_trainer(tmp_path, tiny_model("t5"))._packed
    assert tiny_trainer(tmp_path, other_model("a window of two tokens"))._packed
    chunked = other_model("chunks of two tokens")
    assert not tiny_trainer(tmp_path, chunked)._packed
    with pytest.raises(ValueError, match="padding_free=True, but Llama4ForCausalLM has layers that do not attend"):
        tiny_trainer(tmp_path, chunked, padding_free=True)
    assert chunked.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="padding_free=True does not work with torch_compile"):
        tiny_trainer(tmp_path, padding_free=True, torch_compile=True, torch_compile_backend="eager")


class Waits(TorchDispatchMode):
    """Notes operations whose results the host must wait for, were they on a GPU.

    `tolist` of what is on the CPU, or `torch.tensor` on a device, are no operations: `Copies` notes them.
    """

    OPERATIONS = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "masked_scatter",
        "equal",
        "_unique2",
        "repeat_interleave",
    )

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        kwargs = kwargs or {}
        masked = name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1])
        blocking = name == "_to_copy" and kwargs.get("device", args[0].device) != args[0].device
        if name in self.OPERATIONS or masked or (blocking and not kwargs.get("non_blocking")):
            self.seen.append(name)
        return func(*args, **kwargs)


class Copies(TorchFunctionMode):
    """Notes in `seen` what is copied to the host, and what is made on it for a device that then waits for it."""

    TO_HOST, MADE = ("tolist", "cpu", "numpy"), ("tensor", "as_tensor")

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        made = name in self.MADE and "device" in kwargs and not isinstance(args[0], torch.Tensor)
        if name in self.TO_HOST or made:
            self.seen.append(name)
        return func(*args, **kwargs)


def between(trainer, begin, end, work, *watches):
    """Carry out `work`, with `watches` entered from the end of the method `begin` to the beginning of `end`."""
    watching, methods = ExitStack(), {name: getattr(trainer, name) for name in (begin, end)}

    def begun(*args):
        methods[begin](*args)
        for watch in watches:
            watching.enter_context(watch)

    def ended(*args):
        watching.close()
        return methods[end](*args)

    setattr(trainer, begin, begun)
    setattr(trainer, end, ended)
    work()


def waits_between(trainer, begin, end, work):
    """What is waited for from the end of the method `begin` to the beginning of the method `end`."""
    waits = Waits()
    between(trainer, begin, end, work, waits, Copies(waits.seen))
    return waits.seen


FOUR_STEPS = {"mini_batch_size": 1, "gradient_accumulation_steps": 2, "ppo_epochs": 2}


@pytest.mark.parametrize(("optim", "waited_for"), [("adamw_torch_fused", []), ("sgd", ["tolist"] * 4)])
def test_no_optimizer_step_of_fused_adam_waits_for_the_device(tmp_path, optim, waited_for):
    """2 epochs of two steps of two micro-batches: four gradient norms, which are waited for with other optimizers."""
    trainer = tiny_trainer(tmp_path, optim=optim, **FOUR_STEPS)
    trainer.step(*tiny_rollouts())
    seen = waits_between(trainer, "_prepare_iteration", "_finish_iteration", lambda: trainer.step(*tiny_rollouts()))
    assert seen == waited_for


@pytest.mark.parametrize("filtered", [None, True])
def test_nor_does_one_under_train(tmp_path, filtered):
    """One iteration; the Trainer's filter waits for whether each of its eight losses is NaN, and infinite."""
    options = {"max_steps": 4, "logging_strategy": "no", "logging_nan_inf_filter": filtered}
    trainer = trainer_for(tmp_path, **FOUR_STEPS, **options)
    seen = waits_between(trainer, "_collect_iteration", "_finish_iteration", trainer.train)
    assert seen == ["_local_scalar_dense"] * (16 if filtered else 0)


def test_what_the_host_knows_is_sent_without_waiting_for_the_device():
    """On a device without data, since that of the CPU would not be sent anywhere."""
    queries, responses, scores = ([tensor.to("meta") for tensor in column] for column in tiny_rollouts())
    rollouts = Rollouts(queries, responses, response_mask(responses), torch.stack(scores))
    model, waits = tiny_model(), Waits()
    model.config._attn_implementation_internal = "flash_attention_of_this_test"
    with waits, Copies(waits.seen):
        torch.ones(2).to("meta")
        torch.tensor([1], device="meta")
        batch = rollouts.micro_batch([2, 0], 0, Layout.PACKED)
        bounds = network_inputs(model, batch)["cu_seq_lens_q"]
    assert bounds.device == batch["rows"].device == batch["position_ids"].device == torch.device("meta")
    assert waits.seen == ["_to_copy", "tensor"]  # those of the first two lines


def test_attention_that_looks_into_the_next_sequence_is_found_out(monkeypatch):
    def leaking(module, *args, packed_row=None, **kwargs):
        return sdpa_attention_forward(module, *args[:3], None, **kwargs)

    assert why_not_packed(tiny_model()) is None
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, PER_SEQUENCE, leaking)
    for model in (tiny_model(), tiny_model(scale=1.0), tiny_model(dtype=torch.bfloat16)):
        assert why_not_packed(model) == "computes something else from a packed row"
        assert Layouts([model])(LONG) is Layout.PADDED
        assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
def test_other_attention_is_padded(implementation):
    model = tiny_model()
    model.set_attn_implementation(implementation)
    assert Layouts([model])(LONG) is Layout.PADDED
    with pytest.raises(ValueError, match=f"LlamaForCausalLM uses {implementation} attention; only SDPA"):
        Layouts([model], padding_free=True)
    assert model.config._attn_implementation == implementation


def test_flash_attention_gets_the_bounds_of_the_sequences(monkeypatch):
    """Its kernels need a GPU: here SDPA stands in for them, cut where the bounds say."""

    def flash(module, query, key, value, attention_mask, cu_seq_lens_q=None, cu_seq_lens_k=None, **kwargs):
        if cu_seq_lens_q is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        assert cu_seq_lens_q.dtype == torch.int32
        assert torch.equal(cu_seq_lens_q, cu_seq_lens_k)
        lengths = cu_seq_lens_q.diff()
        assert kwargs.pop("max_length_q") == kwargs.pop("max_length_k") == int(lengths.max())
        kwargs.pop("position_ids", None)
        return attend_per_sequence(module, query, key, value, None, packed_row=PackedRow(lengths.tolist()), **kwargs)

    name = "flash_attention_of_this_test"
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, name, flash)
    model = tiny_model()
    model.config._attn_implementation_internal = name
    assert Layouts([model], padding_free=True)(LONG) is Layout.PACKED
    assert model.config._attn_implementation == name
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, name, None)
    other = tiny_model()
    other.config._attn_implementation_internal = name
    assert why_not_packed(other).startswith("could not be tried out")


def test_a_network_ready_for_packing_reads_padded_batches_and_generates_as_before():
    model, batch = (
        tiny_model(),
        pad_tokens([torch.tensor([5, 6, 7]), torch.tensor([8])], [torch.tensor([3, 4])] * 2, 0),
    )
    plain = copy.deepcopy(model)
    assert Layouts([model], padding_free=True)(LONG) is Layout.PACKED
    assert model.config._attn_implementation == PER_SEQUENCE
    for network in (model, plain):
        network.eval()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    prompt = {name: tensor[:, :3] for name, tensor in inputs.items() if name != "position_ids"}
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**prompt, **options), plain.generate(**prompt, **options))
    assert "_attn_implementation" not in model.config.to_dict()


def test_a_model_that_scales_its_logits_computes_them_itself(tmp_path):
    model = other_model("scaled logits")
    assert trunk_and_head(model) is None and trunk_and_head(tiny_model()) is not None
    assert trunk_and_head(AutoModelForSequenceClassification.from_config(tiny_model().config)) is None
    query, response = torch.tensor([5, 6, 7]), torch.tensor([9, 3])
    logprobs_BR, _ = response_logprobs(model, pad_tokens([query], [response], 0), 2)
    logits = model(input_ids=torch.cat([query, response])[None]).logits[0, 2:4]
    torch.testing.assert_close(logprobs_BR[0], logits.log_softmax(-1)[[0, 1], response])
    assert tiny_trainer(tmp_path, model)._packed


@pytest.mark.parametrize("scaled", [True, False])
def test_a_packed_row_through_the_models_own_forward_is_each_row_alone(scaled):
    """Three rows, seven response tokens: the head makes seven rows of logits, and all that is read is exact."""
    model = (other_model("scaled logits") if scaled else tiny_model()).double()
    let_pack(model)
    queries = [torch.tensor(ids) for ids in ([5, 6, 7], [8], [4, 9])]
    responses = [torch.tensor(ids) for ids in ([9, 3], [2, 11, 12, 6], [7])]
    made = []
    hook = model.get_output_embeddings().register_forward_hook(
        lambda module, args, output: made.append(output.shape[1])
    )
    options = {"with_entropy": True, "with_hidden": True, "with_logits": True, "own_forward": True}
    packed = policy_outputs(model, pack_tokens(queries, responses), 4, 0.7, **options)
    hook.remove()
    assert made == [7]
    expected = []
    for query, response in zip(queries, responses, strict=True):
        output = model(input_ids=torch.cat([query, response])[None], output_hidden_states=True)
        rows = slice(len(query) - 1, -1)
        logits, hidden = output.logits[0, rows] / 0.7, output.hidden_states[-1][0, rows]
        log_softmax = logits.log_softmax(-1)
        of_tokens = log_softmax.gather(-1, response[:, None])[:, 0]
        expected.append((of_tokens, -(log_softmax.exp() * log_softmax).sum(-1), hidden, logits))
    for row, of_row in enumerate(expected):
        for found_BR, wanted in zip(packed, of_row, strict=True):
            torch.testing.assert_close(found_BR[row, : len(wanted)], wanted, rtol=0, atol=1e-12)
            assert not found_BR[row, len(wanted) :].any()
    weights = list(model.parameters())
    together = torch.autograd.grad(packed.logprobs_BR.square().sum(), weights, allow_unused=True)
    alone = torch.autograd.grad(sum(row[0].square().sum() for row in expected), weights, allow_unused=True)
    for found, wanted in zip(together, alone, strict=True):
        assert (found is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-7)  # Cohere norms in float32


def test_logits_in_chunks_give_the_same_and_none_is_kept_for_the_backward_pass(monkeypatch):
    """Seven tokens, 32 words, two tokens a chunk: no tensor as wide as the vocabulary waits for the backward pass."""
    torch.manual_seed(0)
    head, hidden, targets = torch.nn.Linear(8, 32), torch.randn(7, 8, requires_grad=True), torch.arange(7) * 4
    results = []
    for entries in (7 * 32, 2 * 32):
        monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", entries)
        kept: list[torch.Size] = []

        def keep(tensor, kept=kept):
            kept.append(tensor.shape)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logprobs_M, entropy_M = head_logprobs(head, hidden, targets, temperature=0.7, with_entropy=True)
        assert not entropy_M.requires_grad
        loss = (logprobs_M * torch.linspace(-1, 1, 7)).square().sum()
        gradients = torch.autograd.grad(loss, [hidden, head.weight, head.bias])
        results.append([logprobs_M.detach(), entropy_M, *gradients])
        assert any(shape[-1:] == (32,) for shape in kept) is (entries == 7 * 32)
    for at_once, in_chunks in zip(*results, strict=True):
        torch.testing.assert_close(in_chunks, at_once)
    exact = (head(hidden.detach()) / 0.7).log_softmax(-1)
    expected = (exact.gather(-1, targets[:, None])[:, 0], -(exact.exp() * exact).sum(-1))
    torch.testing.assert_close(tuple(results[1][:2]), expected)
    # What other devices than the CPU take; their kernel is not there to be tried.
    by_trl = logprobs._token_logprobs_by_trl(head(hidden.detach()) / 0.7, targets, with_entropy=True)
    torch.testing.assert_close(by_trl, expected)


@pytest.mark.parametrize("family", ["dbrx", "moshi"])
def test_a_config_with_parts_that_no_model_has_read_is_left_as_it_was(family):
    """Their implementation of attention is None, for which no network can be asked."""
    network = small_model(family).eval()
    configs = {"": network.config, **{name: getattr(network.config, name) for name in network.config.sub_configs}}
    before = {name: config._attn_implementation for name, config in configs.items()}
    with attending_with(network, PER_SEQUENCE):
        assert network.config._attn_implementation == PER_SEQUENCE
    assert {name: config._attn_implementation for name, config in configs.items()} == before
    assert None in before.values() and "could not be tried out" not in (why_not_packed(network) or "")
