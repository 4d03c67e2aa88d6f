"""FSDP2 on two processes against one process: accelerate's own path, sharded weights and all, on CPU.

accelerate takes up FSDP for GPUs and their like only, and trains with DDP elsewhere. All that these tests do about it
is to tell accelerate that its processes are such; everything behind that runs on CPU with gloo.
"""

import accelerate
import pytest
import torch
from accelerate.utils import DistributedType
from packaging.version import Version
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from tests._engines import (
    ACCUMULATED,
    BY_TOKENS,
    alone,
    announce_rank,
    assert_equal_outcome,
    assert_equal_runs,
    assert_reloads,
    normalized,
    on_one_base,
    rows_of,
    stepped,
    trained,
    trained_in_parts,
)
from tests._two_processes import run_in_two_processes
from tests.families import family_model
from tests.test_own_critic import critic
from tests.test_packing import other_model
from tests.test_update import assert_same
from tests.tiny import tiny_config, tiny_model, tiny_rollouts, tiny_trainer
from trl_apa.models.trials import LONG
from trl_apa.rollout.batch import Layout


pytestmark = pytest.mark.skipif(
    Version(accelerate.__version__) < Version("1.15"), reason="FSDP2 is tested with the versions of constraints/ci.txt"
)


WITHOUT_CRITIC = {"advantage_estimator": "batch", "whiten_advantages": False}
WINDOW = 8
CLIPPED_APART = {"max_grad_norm": 0.5, "value_max_grad_norm": 0.05}


def with_fsdp(folder, state_dict_type="FULL_STATE_DICT", **config):
    args = tiny_config(folder, fsdp=True, fsdp_config={"version": 2, "state_dict_type": state_dict_type}, **config)
    args.distributed_state.distributed_type = DistributedType.MULTI_GPU
    return args


def in_half_precision(folder, rows):
    """What the update reads of the networks: bfloat16 inside, but not rounded on its way out."""
    trainer, _ = stepped(with_fsdp, folder, rows, config={"bf16": True})
    batch = trainer.run_state.iteration.rollouts.micro_batch(range(4), 0)
    with torch.no_grad():
        outputs = trainer.model_wrapped(**trainer._model_inputs(batch))
    return {name: (output.dtype, output.float()) for name, output in outputs.items()}


def in_packed_rows(folder, rows, model, longest):
    """What comes of two steps in which rows of so many tokens are packed."""
    trainer, outcome = stepped(with_fsdp, folder, rows, model, ACCUMULATED)
    assert trainer.layouts(longest) is Layout.PACKED
    return outcome


def everything(rank, folder, base):
    announce_rank(rank)
    rows = rows_of(rank)
    trainer, full = stepped(with_fsdp, f"{folder}/full", rows, config=ACCUMULATED)
    assert trainer.is_fsdp_enabled and trainer.accelerator.is_fsdp2
    assert trainer.layouts(LONG) is Layout.PACKED
    module = trainer.model
    for layers in (module.policy.model.layers, module.value_model.network.layers, trainer.ref_model.model.layers):
        for parameter in layers.parameters():
            assert isinstance(parameter, DTensor) and parameter.to_local().numel() == parameter.numel() // 2
    return {
        "full": full,
        "tied": stepped(with_fsdp, f"{folder}/tied", rows, tiny_model("gpt2"), {"mini_batch_size": 4})[1],
        "row by row": stepped(with_fsdp, f"{folder}/griffin", rows, family_model("griffin", scale=1.0), ACCUMULATED)[
            1
        ],
        "padded": stepped(with_fsdp, f"{folder}/padded", rows, config=ACCUMULATED | {"padding_free": False})[1],
        "scaled logits": in_packed_rows(f"{folder}/scaled", rows, other_model("scaled logits"), LONG),
        "window": in_packed_rows(f"{folder}/window", rows, family_model("window", scale=1.0), WINDOW),
        "by tokens": stepped(with_fsdp, f"{folder}/tokens", rows, config=BY_TOKENS)[1],
        "row by row by tokens": stepped(
            with_fsdp, f"{folder}/griffin-tokens", rows, family_model("griffin", scale=1.0), BY_TOKENS
        )[1],
        "one base": on_one_base(with_fsdp, f"{folder}/one-base", rows, **ACCUMULATED),
        "clipped apart": stepped(with_fsdp, f"{folder}/apart", rows, config=ACCUMULATED | CLIPPED_APART)[1],
        "without a critic": stepped(with_fsdp, f"{folder}/no-critic", rows, config=ACCUMULATED | WITHOUT_CRITIC)[1],
        "normalized": normalized(with_fsdp, f"{folder}/normalized", rows, **ACCUMULATED),
        "own critic": stepped(with_fsdp, f"{folder}/own", rows, None, ACCUMULATED, value_model=critic())[1],
        "train": trained_in_parts(with_fsdp, f"{folder}/train", base, state_dict_type="SHARDED_STATE_DICT"),
        "bf16": in_half_precision(f"{folder}/bf16", rows),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fsdp")


@pytest.fixture(scope="module")
def ranks(folder):
    tiny_model().save_pretrained(folder / "base")
    return run_in_two_processes(everything, str(folder), str(folder / "base"))


def test_two_shards_step_as_one_process_and_save_whole_networks(ranks, folder):
    """Also each network's gradient norm, and what policy and reference answer greedily."""
    _, expected = stepped(alone, folder / "alone")
    for rank in ranks:
        assert_equal_outcome(rank["full"], expected)
    assert_reloads(folder / "full" / "saved", expected["weights"])


def test_so_they_do_with_one_weight_for_both_ends_of_the_policy(ranks, folder):
    _, expected = stepped(alone, folder / "tied-alone", model=tiny_model("gpt2"))
    for rank in ranks:
        assert_equal_outcome(rank["tied"], expected)


@pytest.mark.filterwarnings("ignore:.*rows are processed one by one")
def test_so_they_do_where_rows_are_read_one_by_one(ranks, folder):
    expected = stepped(alone, folder / "griffin-alone", model=family_model("griffin", scale=1.0))[1]
    for rank in ranks:
        assert_equal_outcome(rank["row by row"], expected)
        assert_equal_outcome(rank["row by row by tokens"], expected)


def test_so_they_do_with_padding_and_where_rows_are_packed_through_the_models_own_forward(ranks, folder):
    """Logits that are more than the head's, and a window behind which rows are padded."""
    for name, model in (
        ("padded", None),
        ("scaled logits", other_model("scaled logits")),
        ("window", family_model("window", scale=1.0)),
    ):
        _, expected = stepped(alone, folder / f"{name}-alone", model=model)
        for rank in ranks:
            assert_equal_outcome(rank[name], expected)
    lengths = [len(query) + len(response) for query, response in zip(*tiny_rollouts(8)[:2], strict=True)]
    assert min(lengths) <= WINDOW < max(lengths)


def test_so_they_do_in_passes_of_so_many_tokens(ranks, folder):
    _, expected = stepped(alone, folder / "tokens-alone")
    for rank in ranks:
        assert_equal_outcome(rank["by tokens"], expected)


def test_so_they_do_where_each_network_has_a_clip_of_its_own(ranks, folder):
    expected = stepped(alone, folder / "apart-alone", config=CLIPPED_APART)[1]
    assert expected["stats"]["apa/grad_norm/policy"] > 0.5 and expected["stats"]["apa/grad_norm/value"] > 0.05
    for rank in ranks:
        assert_equal_outcome(rank["clipped apart"], expected)


def test_so_they_do_without_a_critic(ranks, folder):
    _, expected = stepped(alone, folder / "no-critic-alone", config=WITHOUT_CRITIC)
    assert not any(name.startswith("value_model") for name in expected["weights"])
    for rank in ranks:
        assert_equal_outcome(rank["without a critic"], expected)
    assert not (folder / "no-critic" / "saved" / "value_model").exists()


def test_so_they_do_with_a_learned_normalizer(ranks, folder):
    expected = normalized(alone, folder / "normalized-alone")
    for rank in ranks:
        assert_equal_outcome(rank["normalized"], expected)


def test_so_they_do_with_a_critic_of_the_users_own(ranks, folder):
    _, expected = stepped(alone, folder / "own-alone", value_model=critic())
    for rank in ranks:
        assert_equal_outcome(rank["own critic"], expected)
    saved = load_file(folder / "own" / "saved" / "value_model" / "value_head.safetensors")
    prefix = "value_model.module."
    assert_same(
        saved, {n.removeprefix(prefix): w for n, w in expected["weights"].items() if n.startswith(prefix)}, 1e-5
    )


def test_so_they_do_with_all_networks_on_one_base(ranks, folder):
    """Recomputing each layer in the backward pass, over several micro-batches, with pi_init inside the policy."""
    expected = on_one_base(alone, folder / "one-base-alone")
    for rank in ranks:
        assert_equal_outcome(rank["one base"], expected)
    assert_reloads(folder / "one-base" / "saved", expected["weights"], with_adapters=True)


def test_two_shards_train_as_one_process_and_go_on_where_they_stopped(ranks, folder):
    """Also after an evaluation before the first step; with checkpoints of shards, beside which the whole lies."""
    expected = trained(alone, folder / "train-alone", str(folder / "base"), batch_size=4)
    assert_equal_runs([rank["train"] for rank in ranks], expected)
    policy = AutoModelForCausalLM.from_pretrained(folder / "train" / "whole" / "checkpoint-4")
    weights = {name.removeprefix("policy."): w for name, w in expected["weights"].items() if "policy." in name}
    assert_same(policy.state_dict(), weights, tolerance=1e-5)


def test_half_precision_does_not_round_the_log_probs(ranks):
    """accelerate asks FSDP2 to: bfloat16 keeps three digits, and APA squares the difference of two log-probs."""
    dtype, logprobs_BR = ranks[0]["bf16"]["logprobs"]
    assert dtype == torch.float32
    assert not torch.equal(logprobs_BR, logprobs_BR.bfloat16().float())


def test_fsdp_that_accelerate_would_leave_out_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"fsdp: .* it would silently train with NO"):
        tiny_trainer(tmp_path)
