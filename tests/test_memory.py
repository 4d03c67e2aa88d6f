"""Predicted memory against what the real trainer needs and against arithmetic by hand; what the command says."""

import functools
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, MistralConfig

from benchmarks import gpu
from benchmarks.memory import CASES, compare
from tests import _cli
from trl_apa.commands import memory
from trl_apa.memory import Planner, Setup, advice, predict
from trl_apa.memory.networks import build_networks
from trl_apa.memory.optimizers import state_bytes, step_bytes
from trl_apa.memory.prediction import NORMALIZER, PASSING, _autocast, _layout, _longest_rows
from trl_apa.memory.pretending import ACTIVATIONS, LiveBytes, pretending
from trl_apa.memory.setup import SHARDINGS
from trl_apa.memory.shapes import KNOWN, config_of
from trl_apa.memory.sharding import BUFFERS, MASTER, Counts, per_process
from trl_apa.models import varlen
from trl_apa.rollout.batch import Layout


# Numbers of parameters that the models' own pages give.
PUBLISHED = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "meta-llama-3-8b": 8_030_261_248,
    "pythia-70m": 70_426_624,
    "pythia-160m": 162_322_944,
    "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632,
    "pythia-1.4b": 1_414_647_808,
    "pythia-2.8b": 2_775_208_960,
    "pythia-6.9b": 6_857_302_016,
    "pythia-12b": 11_846_072_320,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
}
GIB = 2**30
SMALL = LlamaConfig(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=2,
    vocab_size=1000,
    eos_token_id=None,
)


QUICK_CASES = {"full"}


@pytest.fixture(autouse=True)
def one_thread():
    """Small matrices are slower on several threads, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("autocast", "launches"), [(torch.bfloat16, True), (None, False)], ids=["bf16", "float32"])
def test_packed_rows_attend_in_one_launch_as_on_a_gpu(monkeypatch, autocast, launches):
    kernel, shapes = varlen.varlen_attn, []

    @functools.wraps(kernel)
    def counted(query, *args, **kwargs):
        shapes.append(tuple(query.shape))
        return kernel(query, *args, **kwargs)

    monkeypatch.setattr(varlen, "varlen_attn", counted)
    sizes = {"micro_batch_size": 3, "max_length": 24, "max_new_tokens": 8, "generation_batch_size": 2}
    predict(Setup(SMALL, **sizes, autocast=autocast, dtype=torch.float32))
    assert ((72, 2, 32) in shapes) is launches


@pytest.mark.parametrize(
    "name", [name if name in QUICK_CASES else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_the_prediction_is_what_the_trainer_needs(name):
    predicted, measured = compare(CASES[name])
    assert sum(predicted.update.values()) == pytest.approx(measured.update, rel=0.08)
    assert sum(predicted.generation.values()) == pytest.approx(measured.generation, rel=0.08)


def run(*argv):
    return _cli.run("memory", *argv)


def layers_of_llama_7b(number):
    config = config_of("huggyllama/llama-7b")
    config.num_hidden_layers = number
    return predict(Setup(config, quantization="8bit", value="adapter", micro_batch_size=4))


@pytest.mark.slow
def test_llama_7b_on_one_8_bit_base_stays_below_24_gib_with_micro_batches_of_4():
    one, two, three = (layers_of_llama_7b(number) for number in (1, 2, 3))
    # A layer: 4 * 4096^2 + 3 * 4096 * 11008 bytes, 4 * 4096 + 2 * 11008 + 4096 float32 scales, two norms in bfloat16.
    layer = 202_375_168 + 4 * (4 * 4096 + 2 * 11008 + 4096) + 2 * 2 * 4096
    # Above and below: 2 * 32000 * 4096 and a norm in bfloat16; 64 frequencies of the rotary embedding, kept twice.
    assert one.update["weights: policy"] == layer + 2 * (2 * 32000 * 4096 + 4096) + 2 * 4 * 64
    # Rank 16 on seven matrices, for policy and value model, float32; the value head: 4096 * 8192 + 2 * 8192 + 1.
    adapter, head = 4 * 16 * (4 * 8192 + 3 * 15104), 4 * (4096 * 8192 + 2 * 8192 + 1)
    assert one.update["adapters and heads"] == 2 * adapter + head
    assert one.update["optimizer"] == 2 * (2 * adapter + head)
    # Keys and values of 8 prompts of 896 tokens and 4096, bfloat16: the pass over the prompts needs most.
    assert three.generation["KV cache"] == 3 * 2 * 8 * 896 * 4096 * 2

    def every_part(first, second, step):
        names = first.keys() | second.keys()
        return {name: first.get(name, 0) + step * (second.get(name, 0) - first.get(name, 0)) for name in names}

    # The largest part but the weights grows by the same with every layer, so that 32 need not be pretended here.
    assert sum(three.update.values()) == pytest.approx(sum(every_part(one.update, two.update, 2).values()), rel=0.02)
    whole = sum(every_part(two.update, three.update, 30).values())
    assert 15 * GIB < whole < 24 * GIB


def test_a_part_is_the_sum_of_what_is_alive_at_the_peak():
    live = LiveBytes(lambda tensor: "wide" if tensor.shape[-1] == 100 else None)
    with FakeTensorMode(), live:
        kept = torch.empty(10)  # 40 bytes
        view = kept.view(2, 5)  # none
        gone = torch.empty(100)  # 400 bytes
        del gone
        torch.empty(50)  # 200 bytes, for a moment
    assert live.peak == {ACTIVATIONS: 40, "wide": 400}
    assert {name: size for name, size in live.live.items() if size} == {ACTIVATIONS: 40}
    del kept
    assert live.live[ACTIVATIONS] == 40  # the view holds it
    del view
    assert live.live[ACTIVATIONS] == 0


def test_gradients_that_meet_are_added_in_place():
    live = LiveBytes()
    with FakeTensorMode():
        weight = torch.empty(1000, requires_grad=True)
        live.count("weights", [weight])
        with live:
            doubled = weight * 2
            ((doubled * 3).sum() + (doubled * 5).sum()).backward()
    # In the backward pass: doubled (freed with its graph, 4000 bytes) and two gradients of it; never a third.
    assert live.peak[ACTIVATIONS] < 3.1 * 4000


def test_optimizers_keep_what_their_authors_say():
    large, small = torch.empty(128, 64, device="meta"), torch.empty(100, device="meta")
    assert state_bytes("adamw", [large, small]) == 8 * (8192 + 100)
    # 8192 elements: two moments of a byte each, and two times 32 scales of 256 elements; 100 are below 4096.
    assert state_bytes("adamw_8bit", [large, small]) == 2 * 8192 + 2 * 32 * 4 + 8 * 100
    assert state_bytes("adafactor", [large, small]) == 4 * (128 + 64) + 4 * 100
    assert state_bytes("sgd", [large]) == state_bytes("paged_adamw_8bit", [large]) == 0
    assert (step_bytes("adamw_torch", [large]), step_bytes("adamw", [large])) == (4 * 8192, 0)


@pytest.mark.parametrize(
    ("sharding", "expected"),
    [
        ("ddp", {"gradients": 800, BUFFERS: 800}),
        ("zero2", {"gradients": 200, "optimizer": 400, BUFFERS: 2 * 200 * 2, MASTER: 200}),
        ("zero3", {"gradients": 200, "optimizer": 400, BUFFERS: 2 * 200 * 2 + 2 * 30 * 2, MASTER: 200}),
        ("fsdp2", {"gradients": 200, "optimizer": 400, BUFFERS: (2 * 30 + 50) * 2}),
    ],
)
def test_processes_share_what_their_engine_divides(sharding, expected):
    parts = {"weights: policy": 400, "weights: reward": 40, "optimizer": 1600, "gradients": 800, ACTIVATIONS: 7}
    counts = Counts(trained=200, gradients=800, layer=30, outside=50)
    setup = Setup(SMALL, lora_r=0, world_size=4, sharding=sharding)
    shared = per_process(parts, counts, setup)
    divided = sharding in ("zero3", "fsdp2")
    assert shared == {**parts, **expected, "weights: policy": 100 if divided else 400}
    assert per_process(parts, counts, replace(setup, world_size=1)) == parts


def test_known_shapes_have_the_published_numbers_of_parameters():
    for name, number in PUBLISHED.items():
        setup = Setup(config_of(f"somebody/{name}"), lora_r=0, value="head")
        policy = build_networks(setup)[0].policy
        assert sum(parameter.numel() for parameter in policy.parameters()) == number, name
    assert KNOWN.keys() - PUBLISHED.keys() == {"llama-30b", "llama-65b", "llama-2-7b", "llama-2-13b"}


@pytest.mark.slow
def test_networks_are_counted_where_they_are():
    setup = Setup(SMALL, lora_r=8, dtype=torch.float32, max_length=32, max_new_tokens=8)
    separate = predict(setup).update
    assert separate["weights: value"] == separate["weights: policy"]
    reward = predict(replace(setup, value="adapter", reward="separate", reference="copy")).update
    assert "weights: value" not in reward
    assert reward["weights: reference"] >= reward["weights: policy"]
    # A classifier has a score layer of 64 weights in place of the head's 1000 * 64.
    assert reward["weights: policy"] - reward["weights: reward"] == 4 * 999 * 64
    small = LlamaConfig(**{**SMALL.to_dict(), "hidden_size": 32})
    other = predict(replace(setup, value=small)).update
    assert 0 < other["weights: value"] < separate["weights: value"]


@pytest.mark.slow
def test_without_a_value_model_nothing_of_it_is_planned_for(tmp_path, capsys):
    setup = Setup(SMALL, lora_r=0, dtype=torch.float32, max_length=32, max_new_tokens=8)
    separate, without = predict(setup), predict(replace(setup, value=None))
    assert "weights: value" not in without.update and "adapters and heads" not in without.update
    # The trunk of the value model, which has no vocabulary head of 64 * 1000, and two moments of it and of its head.
    saved = separate.update["weights: value"] + separate.update["adapters and heads"]
    assert separate.update["weights: value"] == pytest.approx(separate.update["weights: policy"] - 4 * 64000, rel=0.01)
    assert separate.update["optimizer"] - without.update["optimizer"] == pytest.approx(2 * saved, rel=0.01)
    assert without.peak < 0.7 * separate.peak
    changes = dict(advice._options(setup))
    assert changes["no value model: advantage_estimator='group', say"] == {"value": None}
    assert not [text for text, _ in advice._options(replace(setup, lora_r=8, value=None)) if "value model" in text]
    SMALL.save_pretrained(tmp_path)
    assert run("--model", tmp_path, "--value", "none", "--generation-batch", 1) == 0
    printed = capsys.readouterr().out
    assert "weights: policy" in printed and "weights: value" not in printed


@pytest.mark.slow
def test_a_learned_log_z_is_on_every_process_and_needs_most_while_it_is_fitted(tmp_path, capsys):
    """(64 + 2)^2 products of float64; of 4096 entries the fit needs more than a short pass of a small model."""
    setup = Setup(SMALL, lora_r=8, dtype=torch.float32, max_length=32, max_new_tokens=8, value=None)
    learned, plain = predict(replace(setup, learned_normalizer=True)), predict(setup)
    assert learned.update[NORMALIZER] == learned.generation[NORMALIZER] == 8 * 66**2
    assert learned.peak - plain.peak == 8 * 66**2
    options = {"hidden_size": 4096, "intermediate_size": 64, "vocab_size": 50, "num_attention_heads": 32}
    wide = replace(setup, config=LlamaConfig(**{**SMALL.to_dict(), **options}), lora_r=1, learned_normalizer=True)
    assert predict(wide).update[ACTIVATIONS] == 6 * 8 * 4098**2
    SMALL.save_pretrained(tmp_path)
    assert run("--model", tmp_path, "--value", "none", "--generation-batch", 1, "--normalizer", "learned") == 0
    assert "learned log Z" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"lora_r": 0, "dtype": torch.float32, "world_size": 4, "sharding": "fsdp2", "value": None},
        {"lora_r": 0, "dtype": torch.float32, "gradient_checkpointing": False},
        {"lora_r": 8, "value": "adapter", "gradient_accumulation_steps": 2},
    ],
)
def test_the_tokens_that_are_proposed_fit_and_hardly_more_would(options):
    """Predicted with them, and with a fifth more; none where the networks alone, or sampling, need more."""
    setup = Setup(SMALL, max_length=64, max_new_tokens=8, generation_batch_size=1, **options)
    prediction = predict(setup)
    passing = sum(prediction.update.get(name, 0) for name in PASSING)
    sizes = [prediction.peak // 2, prediction.peak + 5 * passing, prediction.peak + 20 * passing]
    none, *fitting = Planner(setup).tokens_that_fit(sizes)
    assert none is None
    for size, tokens in zip(sizes[1:], fitting, strict=True):
        assert tokens % 64 == 0
        assert predict(replace(setup, tokens_per_micro_batch=tokens)).peak <= size
        assert predict(replace(setup, tokens_per_micro_batch=int(1.2 * tokens) + 64)).peak > size
    sampled = replace(setup, generation_batch_size=4096)
    assert Planner(sampled).tokens_that_fit(sizes[:2]) == [None, None]


def test_a_micro_batch_of_so_many_tokens_has_as_many_rows():
    """Twice the longest row, and a row that fills it up; whatever is less than a row is a row."""
    options = {"lora_r": 0, "dtype": torch.float32, "value": None, "gradient_accumulation_steps": 2}
    setup = Setup(SMALL, max_length=64, max_new_tokens=8, **options)
    by_rows = predict(replace(setup, micro_batch_size=2)).update
    assert predict(replace(setup, tokens_per_micro_batch=160)).update[ACTIVATIONS] > by_rows[ACTIVATIONS]
    for tokens, rows in (
        (1, [(56, 8)]),
        (128, 2 * [(56, 8)]),
        (160, [*2 * [(56, 8)], (24, 8)]),
        (133, 2 * [(56, 8)] + [(1, 4)]),
    ):
        laid_out = _longest_rows(replace(setup, tokens_per_micro_batch=tokens), Layout.PACKED)
        assert laid_out["sequence_lengths"] == tuple(map(sum, rows))
        assert len(laid_out["response_index"]) == sum(response for _, response in rows)
    padded = _longest_rows(replace(setup, tokens_per_micro_batch=160), Layout.PADDED)
    assert padded["input_ids"].shape == (2, 64)
    texts = [text for text, _ in advice._candidates(replace(setup, tokens_per_micro_batch=200))]
    assert "tokens_per_micro_batch=100" in texts and not any("micro-batches of" in text for text in texts)
    with pytest.raises(ValueError, match="tokens_per_micro_batch=0: it should be at least 1"):
        replace(setup, tokens_per_micro_batch=0)


@pytest.mark.slow
def test_what_to_change_is_sorted_by_what_it_saves_and_each_line_holds():
    setup = Setup(SMALL, lora_r=8, quantization="4bit", micro_batch_size=4, max_length=64, max_new_tokens=8)
    setup = replace(setup, gradient_checkpointing=False, optimizer="sgd", generation_batch_size=1)
    peak = predict(setup).peak
    found = advice.changes(setup, peak)
    savings = [change.saved for change in found]
    assert savings == sorted(savings, reverse=True) and min(savings) > 0.01 * peak
    by_text = {change.text: change for change in found}
    checkpointing = by_text["gradient checkpointing"]
    assert (
        checkpointing.peak == predict(replace(setup, gradient_checkpointing=True)).peak == peak - checkpointing.saved
    )
    assert {"micro-batches of 2, with 2 accumulation steps", "value model: an adapter on the policy's base"} < set(
        by_text
    )


@pytest.mark.slow
def test_sharding_divides_full_fine_tuning():
    setup = Setup(SMALL, lora_r=0, dtype=torch.float32, max_length=32, max_new_tokens=8)
    alone = predict(setup)
    four = {kind: predict(replace(setup, world_size=4, sharding=kind)) for kind in SHARDINGS}
    assert four["ddp"].peak > alone.peak
    assert four["fsdp2"].update["optimizer"] == alone.update["optimizer"] // 4
    assert four["fsdp2"].update["weights: policy"] == alone.update["weights: policy"] // 4
    # In bfloat16, all but the buffer of rotary frequencies.
    assert four["zero2"].update["weights: policy"] == pytest.approx(alone.update["weights: policy"] / 2, rel=1e-3)
    assert four["zero3"].peak < four["zero2"].peak < alone.peak


def test_what_cannot_be_predicted_is_refused_by_name(capsys, monkeypatch):
    def not_reachable(name):
        raise OSError("no network")

    monkeypatch.setattr("trl_apa.memory.shapes.AutoConfig.from_pretrained", not_reachable)
    shape = "family=llama,hidden_size=32,num_hidden_layers=1"
    for options, problem in {
        (): "model is not set",
        ("--model", "someone/something"): "is no folder, its config cannot be had from the hub (no network)",
        ("--model", "hidden_size=3"): "family=None",
        ("--model", f"{shape},hiden_size=3"): "hiden_size: LlamaConfig has no such entry",
        ("--model", f"{shape},vocab_size=many"): "vocab_size='many' in a shape should be a whole number",
        ("--model", shape, "--new-tokens", "2000"): "max_new_tokens=2000 should be less than max_length=1024",
        ("--model", shape, "--lora-r", "0", "--value", "adapter"): "value='adapter' needs adapters",
        ("--model", shape, "--num-unfrozen-layers", "1"): "num_unfrozen_layers has no effect with adapters",
        ("--model", "gpt2", "--lora-target-modules", "q_proj"): "q_proj",
        ("--model", shape, "--quantization", "8bit", "--world-size", "2", "--sharding", "fsdp2"): "are not sharded",
        ("--model", shape, "--batch", "0"): "micro_batch_size=0: it should be at least 1",
    }.items():
        assert problem in _cli.refused(capsys, "memory", *options)


@pytest.mark.parametrize("sharding", ["ddp", "zero3"])
def test_a_budget_of_tokens_is_proposed_and_taken_under_each_engine(tmp_path, capsys, sharding):
    SMALL.save_pretrained(tmp_path)
    options = ("--model", tmp_path, "--value", "head", "--lora-r", 0, "--world-size", 2, "--sharding", sharding)
    assert run(*options) == 0
    assert "largest tokens_per_micro_batch that fits" in capsys.readouterr().out
    assert run(*options, "--tokens-per-micro-batch", 512) == 0


@pytest.mark.slow
def test_the_command_says_what_to_change_when_a_card_is_too_small(tmp_path, capsys, monkeypatch):
    SMALL.save_pretrained(tmp_path)
    options = ("--model", tmp_path, "--value", "head", "--lora-r", 0, "--optim", "sgd", "--generation-batch", 1)
    monkeypatch.setattr("trl_apa.commands.memory.CARDS", {"24 GB": 0.7, "80 GB": 1.0})
    assert run(*options) == 0
    head, _, tail = capsys.readouterr().out.partition("what to change, each change alone:\n")
    # 0.75 GiB are assumed whatever the model.
    proposed = re.search(r"^largest tokens_per_micro_batch that fits: 80 GB: (\d+)$", head, re.MULTILINE)
    assert int(proposed[1]) >= 1024 and int(proposed[1]) % 64 == 0
    assert "24 GB (1 GiB usable): does not fit, 0.1 GiB too much" in head and "80 GB (1 GiB usable): fits" in head
    assert tail.splitlines() == ["  nothing that this command knows of"]
    monkeypatch.setattr("trl_apa.memory.prediction.Planner.tokens_that_fit", lambda self, sizes: [None, None])
    assert run(*options, "--overhead", 0) == 0
    assert "what to change" not in capsys.readouterr().out
    assert memory.proposal([None, None]) == "largest tokens_per_micro_batch that fits: none, with any card"
    change = advice.Change("sell it", peak=2**29, saved=3 * 2**28)
    assert memory.advice([change]) == ["  -   0.8 GiB  sell it (0.5 GiB, fits 24 GB)"]


def test_the_page_has_every_option():
    page = (Path(__file__).parents[1] / "docs" / "memory.md").read_text()
    listed = {name for row in re.findall(r"^\| (`.*?) \|", page, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert memory.MemoryArguments.__dataclass_fields__.keys() == listed


@pytest.mark.slow
def test_the_gpu_benchmark_runs_at_a_small_scale(tmp_path, capsys):
    gpu.main(
        [
            "--scale",
            "tiny",
            "--micro-batches",
            "2",
            "--rollouts",
            "2",
            "--repeats",
            "1",
            "--output",
            f"{tmp_path}/o.json",
        ]
    )
    results = {row["layout"]: row for row in json.loads((tmp_path / "o.json").read_text())}
    assert list(results) == list(gpu.LAYOUTS)
    for row in results.values():
        assert row["predicted_step"] == pytest.approx(row["step_peak"], rel=0.5)
        assert row["step_peak"] > row["loaded"] > 0 and row["step_seconds"] > 0 and row["generate_seconds"] > 0
    loaded = [results[layout]["loaded"] for layout in ("one-base", "separate-8bit", "separate-bf16", "full")]
    assert loaded == sorted(set(loaded))
    assert capsys.readouterr().out.count("| separate-8bit | 2 |") == 1


def test_flops_of_a_row_by_hand():
    config = LlamaConfig(
        hidden_size=4,
        intermediate_size=6,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=10,
    )
    # A layer: q and o 16 weights each, k and v 8 each, the MLP 3 * 24: 120. Ten tokens, four of them responses:
    # 2 * 3 * 120 * 10 + 2 * 3 * 4 * 10^2 in the trunk, 2 * 4 * 10 * 4 for the vocabulary.
    trunk, vocabulary = gpu.row_flops(config, prompt=6, response=4)
    assert (trunk, vocabulary) == (7200 + 2400, 320)
    # Beforehand the reference (9600 + 320) and the value model (9600); then the policy and the value model, three
    # times that where all weights are trained, twice where the base is frozen.
    assert gpu.step_flops("full", trunk, vocabulary) == 9920 + 9600 + 3 * (9920 + 9600)
    assert gpu.step_flops("one-base", trunk, vocabulary) == 9920 + 9600 + 2 * (9920 + 9600)


def test_rows_beyond_a_window_are_predicted_as_a_gpu_reads_them():
    """Padded in float32, in which no kernel attends in one launch, and packed in half precision."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 1000}
    config = MistralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, sliding_window=16, eos_token_id=None)
    layouts = {}
    for dtype in (None, torch.bfloat16):
        setup = Setup(config, max_length=48, max_new_tokens=16, value="head", dtype=torch.float32, autocast=dtype)
        module, _ = build_networks(setup)
        with pretending(module), _autocast(setup):
            layouts[dtype] = _layout(module, setup)
    assert layouts == {None: Layout.PADDED, torch.bfloat16: Layout.PACKED}
