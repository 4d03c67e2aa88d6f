"""Packed rows in one launch a layer: the results of each row alone, with a plain stand-in for torch's kernel."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, MistralConfig, Qwen2Config
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.families import family_model
from tests.test_packing import Copies, Waits
from tests.test_shared_prompts import PROMPTS, QUERIES, RESPONSES, SCORES, allow, assert_gradients_close
from tests.test_update import assert_same, parameters_after_step, row_logprobs
from tests.tiny import LAYERS, SHARED, lora_config, tiny_model, tiny_trainer
from tests.varlen_stand_in import StandIn, as_if_on_a_gpu, parameters, sdpa_calls
from trl_apa.models import layouts, trial_memory, varlen
from trl_apa.models.layouts import Layouts, layout_trial, shares_prompts, why_not_packed
from trl_apa.models.logprobs import response_logprobs, trunk_and_head
from trl_apa.models.packed_rows import PackedRow
from trl_apa.models.packing import PER_SEQUENCE, attend_per_sequence, crosses_a_window, let_share
from trl_apa.models.trials import LONG
from trl_apa.rollout.batch import Layout, pack_tokens


EXACT = (torch.float32, torch.float64)
VERSIONS = ("2.10", "2.11", "2.12")
OPTIONS = {**SHARED, **LAYERS, "intermediate_size": 32, "num_key_value_heads": 1}
# Windows are shorter than the rows of six to ten tokens; Qwen2's are in its second layer alone.
MODELS = {
    **{family: lambda family=family: tiny_model(family, scale=2.0) for family in ("llama", "gpt_neox", "opt")},
    "mistral": lambda: scaled(MistralConfig(**OPTIONS, sliding_window=3)),
    "qwen2": lambda: scaled(Qwen2Config(**OPTIONS, use_sliding_window=True, sliding_window=4, max_window_layers=1)),
}


def scaled(config):
    """In which what is seen matters."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2.0)
    return model


@pytest.fixture(autouse=True)
def no_trials_of_other_tests(monkeypatch):
    monkeypatch.setattr(trial_memory, "_OF_EQUAL_NETWORKS", {})
    monkeypatch.setattr(layouts, "_SAID", set())


def test_the_stand_in_has_the_signature_of_the_installed_kernel():
    assert parameters(varlen_attn) in [parameters(StandIn(version).kernel) for version in VERSIONS]


def test_the_bounds_of_a_row():
    """[p p r r | s | q q q | t t]: the second sequence continues the first two tokens, the last the next three."""
    row = PackedRow((4, 1, 3, 2), (0, 2, 0, 3))
    bounds = row.bounds(torch.device("cpu"))
    assert bounds.query_ends.tolist() == [0, 4, 5, 8, 10] and bounds.query_ends.dtype == torch.int32
    assert bounds.key_ends.tolist() == [0, 4, 7, 10, 15] and bounds.key_ends.dtype == torch.int32
    assert (bounds.most_queries, bounds.most_keys) == (4, 5)
    assert bounds.key_index.tolist() == [0, 1, 2, 3, 0, 1, 4, 5, 6, 7, 5, 6, 7, 8, 9]
    assert row.bounds(torch.device("cpu")) is bounds
    alone = PackedRow((4, 1)).bounds(torch.device("cpu"))
    assert alone.key_index is None and alone.key_ends.tolist() == alone.query_ends.tolist() == [0, 4, 5]
    assert row.window(5) is None and row.window(4) == 4 and row.window(None) is None


def test_bounds_are_sent_without_waiting_for_the_device():
    waits = Waits()
    with waits, Copies(waits.seen):
        bounds = PackedRow((4, 1), (0, 2)).bounds(torch.device("meta"))
    assert {part.device.type for part in bounds if isinstance(part, torch.Tensor)} == {"meta"} and waits.seen == []


@pytest.mark.parametrize("window", [None, 3, 1])
@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "one by one"])
def test_each_response_sees_its_prompt_and_itself_within_a_window(monkeypatch, window, heads, at_once):
    """Prompts of three and two tokens, with three responses and two, against one mask of the whole row."""
    stand_in = as_if_on_a_gpu(monkeypatch, dtypes=EXACT) if at_once else None
    row = PackedRow((5, 1, 4, 3, 2), (0, 3, 3, 0, 2))
    place = [0, 1, 2, 3, 4, 3, 3, 4, 5, 6, 0, 1, 2, 2, 3]
    prompt = [0] * 3 + [1] * 2 + [2] + [3] * 4 + [4] * 2 + [5] + [6] * 2
    sees = {0: [0], 1: [0, 1], 2: [0, 2], 3: [0, 3], 4: [4], 5: [4, 5], 6: [4, 6]}
    seen = torch.tensor(
        [
            [
                prompt[key] in sees[prompt[query]] and 0 <= place[query] - place[key] < (window or 99)
                for key in range(15)
            ]
            for query in range(15)
        ]
    )
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, count, 15, 8, dtype=torch.float64) for count in (4, heads, heads))
    module = torch.nn.Module()
    module.num_key_value_groups = 4 // heads
    options = {"packed_row": row, "sliding_window": window, "scaling": 0.3}
    actual, _ = attend_per_sequence(module, query, key, value, None, **options)
    expected = scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(actual, expected.transpose(1, 2))
    if at_once:
        window = (-1, 0) if window is None else (window - 1, 0)
        assert stand_in.calls == [
            {"shape": (15, 4, 8), "keys": 5 + 4 + 7 + 3 + 4, "window": window, "grouped": heads == 2}
        ]


def assert_as_each_row_alone(logprobs_BR, model, plain):
    """Log-probs of packed rows, and the gradient through them, are those of `plain` on each row by itself."""
    logprobs_BR.square().sum().backward()
    alone = [row_logprobs(plain, *row, 0.7) for row in zip(QUERIES, RESPONSES, strict=True)]
    sum(row.square().sum() for row in alone).backward()
    for actual, wanted in zip(logprobs_BR, alone, strict=True):
        torch.testing.assert_close(actual[: len(wanted)], wanted, rtol=1e-5, atol=1e-5)
    assert_gradients_close(model, plain)


@pytest.mark.parametrize("prompts", [None, PROMPTS], ids=["apart", "shared"])
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", MODELS)
def test_logprobs_and_gradients_are_those_of_each_row_alone(monkeypatch, name, version, prompts):
    """Where the kernel of that torch can: else sequence by sequence, with the same results."""
    model, plain = MODELS[name]().eval(), MODELS[name]().eval()
    model.set_attn_implementation(PER_SEQUENCE)
    assert trunk_and_head(model) is not None
    stand_in, one_by_one = as_if_on_a_gpu(monkeypatch, version, EXACT), sdpa_calls(monkeypatch)
    logprobs_BR, _ = response_logprobs(model, pack_tokens(QUERIES, RESPONSES, prompts), 5, temperature=0.7)
    # Of two layers: OPT has scaled its queries, and says so.
    expected = {("mistral", "2.10"): 0, ("qwen2", "2.10"): 1, ("opt", "2.10"): 0}.get((name, version), 2)
    assert len(stand_in.calls) == expected and len(one_by_one) == (2 - expected) * 6
    assert_as_each_row_alone(logprobs_BR, model, plain)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_step_is_that_with_padding(tmp_path, monkeypatch, name, shared, checkpointing):
    """With adapters on both networks; the backward pass computes layers again by the kernel too."""
    allow(monkeypatch, shared)
    results, stand_in = [], None
    for padding_free in (False, True):
        if padding_free:
            stand_in, one_by_one = as_if_on_a_gpu(monkeypatch, dtypes=EXACT), sdpa_calls(monkeypatch)
        options = {"batch_size": 6, "mini_batch_size": 6, "temperature": 0.7, "optim": "sgd", "ppo_epochs": 2}
        kwargs = {"peft_config": lora_config(), "value_model": "adapter"}
        trainer = tiny_trainer(
            tmp_path,
            MODELS[name](),
            kwargs,
            padding_free=padding_free,
            gradient_checkpointing=checkpointing,
            **options,
        )
        torch.manual_seed(1)
        for parameter_name, parameter in trainer.model.named_parameters():
            if "lora_B" in parameter_name or "value_model.head.out" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.1)
        trials = 0 if stand_in is None else len(stand_in.calls)
        results.append(parameters_after_step(trainer, QUERIES, RESPONSES, SCORES))
    # Before the update pi_init and the values, in each epoch both networks; two layers, checkpointed twice.
    assert len(stand_in.calls) - trials >= 2 * (1 + 2 * 2 * (1 + checkpointing))
    assert not [shape for shape in one_by_one if shape[0] == 1 and shape[2] < 4]
    assert {len(call["shape"]) for call in stand_in.calls} == {3}
    assert any(call["keys"] > call["shape"][0] for call in stand_in.calls[trials:]) is shared
    assert_same(*results, tolerance=5e-6)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_under_autocast_the_kernel_gets_half_precision(monkeypatch, name):
    """Rotary positions leave queries and keys in float32 there, and the stand-in refuses them, as the kernel does."""
    model, seen = MODELS[name]().eval(), []
    model.set_attn_implementation(PER_SEQUENCE)
    tokens = pack_tokens(QUERIES, RESPONSES, PROMPTS)
    original = varlen.in_kernel_type
    monkeypatch.setattr(
        "trl_apa.models.packing.in_kernel_type", lambda *states: seen.append(states[0].dtype) or original(*states)
    )
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        expected, _ = response_logprobs(model, tokens, 5)
        assert set(seen) == {torch.float32}
        stand_in, one_by_one = as_if_on_a_gpu(monkeypatch), sdpa_calls(monkeypatch)
        actual, _ = response_logprobs(model, tokens, 5)
    assert len(stand_in.calls) == 2 and not one_by_one
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.1)
    assert not torch.equal(actual, torch.zeros_like(actual))


def states(width=8, of_values=None, dtype=torch.bfloat16, tokens=6):
    torch.manual_seed(0)
    widths = (width, width, of_values or width)
    return [torch.randn(1, 2, tokens, size, dtype=dtype) for size in widths]


POSITION_BIAS = torch.eye(3, dtype=torch.bfloat16)[None, None]
FALLBACKS = {
    "float32": ({"dtype": torch.float32}, {}, "2.12", "it computes in float32, not in one type of half precision"),
    "dropout": ({}, {"dropout": 0.1}, "2.12", "its attention is not plainly causal"),
    "a bias of positions": ({}, {"position_bias": POSITION_BIAS}, "2.12", "is not plainly causal"),
    "not causal": ({}, {"is_causal": False}, "2.12", "is not plainly causal"),
    "odd heads": ({"width": 12}, {}, "2.12", "its heads have a width of 12 for keys and 12 for values"),
    "wide heads": ({"width": 264}, {}, "2.12", "its heads have a width of 264"),
    "heads in the gap": ({"width": 208}, {}, "2.12", "its heads have a width of 208"),
    "narrower values": ({"of_values": 16, "width": 24}, {}, "2.12", "width of 24 for keys and 16 for values"),
    "no windows": ({}, {"sliding_window": 2}, "2.10", "has no windows"),
    "no scale": ({}, {"scaling": 0.5}, "2.10", "takes no scale"),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_what_the_kernel_cannot_do_is_done_one_by_one(monkeypatch, name):
    given, options, version, why = FALLBACKS[name]
    stand_in, one_by_one = as_if_on_a_gpu(monkeypatch, version), sdpa_calls(monkeypatch)
    parts = states(**given)
    packed = {"packed_row": PackedRow((3, 3)), **options}
    module, named = torch.nn.Module(), ("dropout", "scaling", "sliding_window")
    found = varlen.why_not_at_once(module, tuple(parts), *(options.get(name) for name in named), options)
    assert why in found
    torch.manual_seed(1)
    actual, _ = attend_per_sequence(module, *parts, None, **packed)
    assert stand_in.calls == [] and len(one_by_one) == 2
    monkeypatch.undo()
    torch.manual_seed(1)
    torch.testing.assert_close(actual, attend_per_sequence(module, *parts, None, **packed)[0], rtol=0, atol=0)


def test_where_the_kernel_runs():
    """On no CPU, and for tensors without contents, which stand for a GPU's in the memory planner."""
    assert not varlen.is_for_flash(*states()) and not varlen.is_for_flash(*(part.to("meta") for part in states()))
    with FakeTensorMode():
        assert varlen.is_for_flash(*states())
    assert varlen.why_not_at_once(torch.nn.Module(), states(), 0.0, None, None, {}).startswith("torch has no flash")


def test_mixed_types_are_named():
    query, key, value = states()
    why = varlen.why_not_at_once(torch.nn.Module(), (query.float(), key, value), 0.0, None, None, {})
    assert why == "it computes in bfloat16 and float32, not in one type of half precision"


def test_other_numbers_of_keys_than_tokens_are_refused():
    query, key, value = states()
    row = PackedRow((3, 3))
    with pytest.raises(ValueError, match="other numbers of keys or queries than tokens"):
        attend_per_sequence(torch.nn.Module(), query, key[:, :, :5], value[:, :, :5], None, packed_row=row)
    with pytest.raises(ValueError, match="its attention is not causal"):
        attend_per_sequence(
            torch.nn.Module(), query, key, value, None, packed_row=row, is_causal=False, sliding_window=2
        )


# ---- what the trainer makes of it ----


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Launches cost something, as on a GPU."""
    monkeypatch.setattr(layouts, "launches_cost", lambda device: True)


def test_with_one_launch_a_layer_prompts_are_shared_and_windows_packed(monkeypatch, on_a_gpu):
    as_if_on_a_gpu(monkeypatch, dtypes=EXACT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model in (tiny_model(), family_model("window")):
            chosen = Layouts([model])
            assert [chosen(length, share=True) for length in (6, 8, 16)] == [Layout.SHARED] * 3
            assert layout_trial(model, 16).per_sequence is None


def test_without_it_prompts_are_not_shared_nor_windows_packed_and_a_warning_says_so(on_a_gpu):
    model = tiny_model()
    with pytest.warns(UserWarning) as caught:
        assert Layouts([model])(LONG, share=True) is Layout.PACKED
        assert not shares_prompts(model)
    assert [str(warning.message) for warning in caught] == [
        "LlamaForCausalLM: attention of its packed rows takes a launch a sequence instead of one a layer: it computes "
        "in float32, not in one type of half precision"
    ]
    windowed = family_model("window")
    chosen = Layouts([windowed])
    assert [chosen(length, share=True) for length in (6, 8, 16)] == [Layout.PACKED, Layout.PACKED, Layout.PADDED]
    assert why_not_packed(windowed, 16).startswith("has layers with a window, whose mask each sequence")
    with pytest.raises(ValueError, match="padding_free=True, but MistralForCausalLM has layers with a window"):
        Layouts([windowed], padding_free=True)(16)


def test_on_a_cpu_a_launch_costs_nothing():
    assert shares_prompts(tiny_model()) and layout_trial(tiny_model(), LONG).per_sequence is not None
    assert Layouts([family_model("window")])(16, share=True) is Layout.SHARED
    weights = [SimpleNamespace(device=torch.device(kind)) for kind in ("cpu", "cuda", "mps")]
    assert list(map(varlen.launches_cost, weights)) == [False, True, True]


def test_a_kernel_that_aligns_queries_with_the_first_keys_is_found_out(monkeypatch, on_a_gpu):
    """Rows are packed by it, where there are as many queries as keys, and no prompt is shared."""
    as_if_on_a_gpu(monkeypatch, dtypes=EXACT)

    class TopLeft(StandIn):
        def _attend(self, query, key, value, query_ends, key_ends, most_queries, most_keys, scale, window, grouped):
            own = torch.cat(
                [
                    torch.arange(start, start + count)
                    for start, count in zip(key_ends[:-1].tolist(), query_ends.diff().tolist(), strict=True)
                ]
            )
            ends = (query_ends, query_ends, most_queries, most_queries)
            return super()._attend(query, key[own], value[own], *ends, scale, window, grouped)

    monkeypatch.setattr(varlen, "varlen_attn", TopLeft(dtypes=EXACT).kernel)
    model = tiny_model()
    trial = layout_trial(model, LONG)
    assert trial.per_sequence is None and trial.is_exact_packed and not trial.is_exact_shared
    assert Layouts([model])(LONG, share=True) is Layout.PACKED


def test_a_kernel_that_fails_leaves_rows_padded(monkeypatch):
    as_if_on_a_gpu(monkeypatch, dtypes=EXACT)

    def fails(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size, scale):
        raise RuntimeError("no kernel for this device")

    monkeypatch.setattr(varlen, "varlen_attn", fails)
    assert Layouts([tiny_model()])(LONG) is Layout.PADDED
    assert why_not_packed(tiny_model()) == "could not be tried out: no kernel for this device"


# ---- flash attention ----


def flash_stand_in(monkeypatch, name):
    """What transformers registers for a flash attention, with the stand-in in the place of its kernel."""
    stand_in = StandIn(dtypes=EXACT)

    def flash(module, query, key, value, mask, scaling=None, sliding_window=None, cu_seq_lens_q=None, **kwargs):
        states = [part.transpose(1, 2).reshape(-1, part.shape[1], part.shape[3]) for part in (query, key, value)]
        rows, _, length, _ = query.shape
        if cu_seq_lens_q is None:
            ends = (torch.arange(rows + 1, dtype=torch.int32) * length,) * 2 + (length, length)
        else:
            ends = cu_seq_lens_q, kwargs["cu_seq_lens_k"], kwargs["max_length_q"], kwargs["max_length_k"]
        window = (-1 if sliding_window is None else sliding_window - 1, 0)
        output = stand_in.kernel(*states, *ends, scale=scaling, window_size=window, enable_gqa=True)
        return output.unflatten(0, (rows, length)), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, name, flash)
    return stand_in, flash


@pytest.mark.parametrize("prompts", [None, PROMPTS], ids=["apart", "shared"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_flash_attention_reads_shared_prompts_by_its_own_call(monkeypatch, name, prompts):
    """One a layer, of gathered keys and values; what it is called without a packed row is handed on."""
    model, plain = MODELS[name]().eval(), MODELS[name]().eval()
    kind = f"flash_attention_of_{name}"
    stand_in, flash = flash_stand_in(monkeypatch, kind)
    model.config._attn_implementation_internal = kind
    assert Layouts([model], padding_free=True)(LONG, share=True) is Layout.SHARED
    assert ALL_ATTENTION_FUNCTIONS[kind].__wrapped__ is flash
    assert let_share(kind) and ALL_ATTENTION_FUNCTIONS[kind].__wrapped__ is flash  # wrapped once
    stand_in.calls.clear()
    logprobs_BR, _ = response_logprobs(model, pack_tokens(QUERIES, RESPONSES, prompts), 5, temperature=0.7)
    tokens, keys = (41, 41) if prompts is None else (28, 41)
    assert [(call["shape"][0], call["keys"]) for call in stand_in.calls] == [(tokens, keys)] * 2
    assert_as_each_row_alone(logprobs_BR, model, plain)


def test_other_attention_is_told_of_no_shared_prompt():
    assert let_share(PER_SEQUENCE) and not let_share("eager")


def test_windows_are_crossed_where_layers_have_them():
    model = MODELS["qwen2"]()
    assert crosses_a_window(model, 5) and not crosses_a_window(model, 4)
    model.config.layer_types = ["full_attention"] * 2
    assert not crosses_a_window(model, 5) and not crosses_a_window(tiny_model(), 10**6)
