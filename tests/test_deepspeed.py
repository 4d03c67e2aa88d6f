"""DeepSpeed's ZeRO-2 and ZeRO-3 on two processes against one process, on CPU: `make test-distributed` runs these."""

import os

import pytest
import torch

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
from tests.test_models import reward_model
from tests.test_training import few_nines
from tests.test_update import assert_same
from tests.tiny import lora_config, tiny_config, tiny_model, tiny_rollouts, tiny_tokenizer
from trl_apa import APATrainer
from trl_apa.models.trials import LONG
from trl_apa.rollout.batch import Layout


os.environ["DS_ACCELERATOR"] = "cpu"  # inherited by the processes that import DeepSpeed
deepspeed = pytest.importorskip("deepspeed", reason="make test-distributed installs it")

AUTO = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
PADDED = ACCUMULATED | {"padding_free": False}
WITHOUT_CRITIC = ACCUMULATED | {"advantage_estimator": "batch"}
# DeepSpeed does not know the gradient of one network alone.
MISSING = ("apa/grad_norm/policy", "apa/grad_norm/value")


def zero(stage, **config):
    """Options for DeepSpeed under which weights as small as ours are sharded, too."""
    sharding = {"stage": stage, "stage3_param_persistence_threshold": 0}
    sharding["stage3_gather_16bit_weights_on_model_save"] = True
    return {"zero_optimization": sharding, **dict.fromkeys(AUTO, "auto"), **config}


def with_zero(stage, **options):
    def make_config(folder, **config):
        return tiny_config(folder, deepspeed=zero(stage, **options), **config)

    return make_config


def refusal(make_trainer):
    with pytest.raises((ValueError, FloatingPointError)) as refused:
        make_trainer()
    return str(refused.value)


def refused_options(stage, folder):
    def refused(deepspeed=None, optimizer=None, adapters=None, **config):
        model = tiny_model()
        optimizer = optimizer and optimizer(model.parameters(), lr=0.1)
        args = tiny_config(folder, deepspeed=deepspeed or zero(stage), **config)
        return refusal(
            lambda: APATrainer(args, model, tokenizer=tiny_tokenizer(), optimizer=optimizer, **(adapters or {}))
        )

    unsaved = zero(3)
    del unsaved["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]
    offloaded = zero(stage)
    offloaded["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    on_one_base = {"peft_config": lora_config(), "value_model": "adapter"}
    return [
        refused(optimizer=torch.optim.SGD),
        refused(loss_type="ppo"),
        refused(deepspeed=unsaved),
        refused(deepspeed=offloaded, adapters=on_one_base),
        refused(max_grad_norm=1.0, value_max_grad_norm=1.0),
    ]


def overflow(make_config, folder, rank):
    """What a gradient that is not finite leads to, and the weights before and after."""
    args = make_config(folder, batch_size=4)
    trainer = APATrainer(args, tiny_model(), tokenizer=tiny_tokenizer(), ref_model=tiny_model())
    queries, responses, scores = tiny_rollouts(4, seed=rank)
    trainer.step(queries, responses, scores)
    before = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    before = {name: weight.clone() for name, weight in (before or {}).items()}
    compute_loss = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: compute_loss(*args, **kwargs) * float("nan")
    message = refusal(lambda: trainer.step(queries, responses, scores))
    after = trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}
    return message, before, {name: weight.clone() for name, weight in after.items()}


def everything(rank, stage, folder, base, judge):
    announce_rank(rank)
    # What accelerate does on GPUs before a model is loaded in parts.
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    rows, make_config = rows_of(rank), with_zero(stage)
    # All before the first config: ZeRO-3 shards what is made later, and then nothing can scale or compare its weights.
    full, tokens, no_critic, padded = (tiny_model() for _ in range(4))
    trainer, full = stepped(make_config, f"{folder}/full", rows, full, ACCUMULATED)
    assert trainer.is_deepspeed_enabled and trainer.model_wrapped.zero_optimization_stage() == stage
    assert trainer.layouts(LONG) is Layout.PACKED
    held = sum(parameter.numel() for parameter in trainer.model.parameters())
    return {
        "full": full,
        "held": held,
        "by tokens": stepped(make_config, f"{folder}/tokens", rows, tokens, BY_TOKENS)[1],
        "without a critic": stepped(make_config, f"{folder}/no-critic", rows, no_critic, WITHOUT_CRITIC)[1],
        "padded": stepped(make_config, f"{folder}/padded", rows, padded, PADDED)[1],
        "normalized": normalized(make_config, f"{folder}/normalized", rows, base, **ACCUMULATED),
        "one base": on_one_base(make_config, f"{folder}/one-base", rows, base, **ACCUMULATED),
        "train": trained_in_parts(make_config, f"{folder}/train", base, reward_funcs=[few_nines, judge]),
        "bf16": stepped(with_zero(stage, bf16={"enabled": True}), f"{folder}/bf16", rows, base, {"bf16": True})[1],
        "overflow": overflow(make_config, f"{folder}/overflow", rank),
        "refused": refused_options(stage, folder),
    }


@pytest.fixture(scope="module", params=[2, 3], ids=["zero2", "zero3"])
def stage(request):
    return request.param


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a policy and a reward model, which ZeRO-3 cuts up while they are loaded."""
    folder = tmp_path_factory.mktemp("models")
    tiny_model().save_pretrained(folder / "base")
    reward_model().save_pretrained(folder / "judge")
    return str(folder / "base"), str(folder / "judge")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, stage):
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def ranks(stage, folder, models):
    return run_in_two_processes(everything, stage, str(folder), *models)


def test_two_processes_step_as_one_and_save_whole_networks(ranks, folder, stage):
    """What policy and reference answer greedily, too."""
    trainer, expected = stepped(alone, folder / "alone")
    for rank in ranks:
        assert_equal_outcome(rank["full"], expected, MISSING)
        whole = sum(parameter.numel() for parameter in trainer.model.parameters())
        assert rank["held"] == (whole if stage == 2 else 0)
    assert_reloads(folder / "full" / "saved", expected["weights"])


@pytest.mark.parametrize("how", ["by tokens", "padded"])
def test_so_they_do_in_other_passes(ranks, folder, how):
    _, expected = stepped(alone, folder / f"{how}-alone")
    for rank in ranks:
        assert_equal_outcome(rank[how], expected, MISSING)


def test_so_they_do_without_a_critic(ranks, folder):
    _, expected = stepped(alone, folder / "no-critic-alone", config={"advantage_estimator": "batch"})
    for rank in ranks:
        assert_equal_outcome(rank["without a critic"], expected, ["apa/grad_norm/policy"])


def test_so_they_do_with_a_learned_normalizer(ranks, folder, models):
    expected = normalized(alone, folder / "normalized-alone", model=models[0])
    for rank in ranks:
        assert_equal_outcome(rank["normalized"], expected, MISSING)


def test_so_they_do_with_all_networks_on_one_base(ranks, folder, models):
    """Recomputing each layer in the backward pass, over several micro-batches, with pi_init inside the policy."""
    expected = on_one_base(alone, folder / "one-base-alone", model=models[0])
    for rank in ranks:
        assert_equal_outcome(rank["one base"], expected, MISSING)
    assert_reloads(folder / "one-base" / "saved", expected["weights"], with_adapters=True)


def test_two_processes_train_as_one_and_go_on_where_they_stopped(ranks, folder, models):
    """With a policy and a reward model by name, and an evaluation before the first step."""
    base, judge = models
    expected = trained(alone, folder / "train-alone", base, reward_funcs=[few_nines, judge], batch_size=4)
    assert_equal_runs([rank["train"] for rank in ranks], expected, MISSING)


def test_half_precision_comes_near(ranks, folder):
    """Also where a policy is sharded in bfloat16 as it is loaded, and the new value head is not."""
    expected = stepped(alone, folder / "float32")[1]["stats"]
    for name in ("apa/loss/policy", "apa/loss/value", "apa/grad_norm/total", "objective/entropy"):
        assert ranks[0]["bf16"]["stats"][name] == pytest.approx(expected[name], rel=0.05), name


def test_a_gradient_that_is_not_finite_changes_no_weight(ranks):
    for message, before, after in (rank["overflow"] for rank in ranks):
        assert "gradient norm is inf at optimizer step 1" in message
        if before:
            assert_same(after, before, tolerance=1e-30)


def test_what_deepspeed_would_do_otherwise_is_refused(ranks):
    for optimizer, ratio, unsaved, offloaded, apart in (rank["refused"] for rank in ranks):
        assert optimizer.startswith("optimizer: DeepSpeed would ignore it")
        assert ratio.startswith("ratio_threshold=10.0: DeepSpeed updates the weights inside the backward pass")
        assert unsaved.startswith("deepspeed: set zero_optimization.stage3_gather_16bit_weights_on_model_save to true")
        assert "offload_optimizer would accumulate the value model's gradients" in offloaded
        assert apart.startswith("value_max_grad_norm=1.0: DeepSpeed clips the gradient of both networks together")
