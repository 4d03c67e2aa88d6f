"""What only a GPU shows: its kernels, its precisions, its random numbers, and what the host waits for.

`make gpu-check` runs them, on one GPU but for the last. Without a GPU they are skipped; TRL_APA_GPU_TESTS_ON=cpu
rehearses those that a CPU can carry out, and TRITON_INTERPRET=1 Triton's kernels, where Triton is installed.
"""

import functools
import os
import warnings

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig
from transformers.utils import is_flash_attn_2_available, is_triton_available

from tests._engines import announce_rank, rows_of
from tests._two_processes import run_in_two_processes
from tests.test_packing import FOUR_STEPS, between, waits_between
from tests.test_shared_prompts import allow
from tests.test_training import PROMPTS, StopAt, few_nines
from tests.test_update import assert_same, parameters_after_step
from tests.tiny import (
    FAMILIES,
    SHARED,
    VOCABULARY,
    lora_config,
    tiny_model,
    tiny_rollouts,
    tiny_tokenizer,
)
from tests.varlen_stand_in import as_if_on_a_gpu
from trl_apa import APAConfig, APATrainer
from trl_apa.checking import memory, run
from trl_apa.models import fused_head, layouts, load_policy, logprobs, packing, trial_memory, varlen
from trl_apa.rollout import generation
from trl_apa.rollout.batch import Layout


ON_GPU = torch.cuda.is_available()
REHEARSED = os.environ.get("TRL_APA_GPU_TESTS_ON") == "cpu" and not ON_GPU
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
# Read when cuBLAS starts: without it a sum may come in another order each time.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (ON_GPU or REHEARSED), reason="torch sees no GPU (TRL_APA_GPU_TESTS_ON=cpu rehearses)"),
]
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="a CPU cannot do this")
needs_flash = pytest.mark.skipif(
    not (ON_GPU and is_flash_attn_2_available()), reason="no flash attention is installed"
)
FLOAT32 = {"bf16": False}
SGD = {**FLOAT32, "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant"}


def trainer_on(device, folder, model=None, trainer_kwargs=None, **options):
    """A trainer whose networks are on `device`, and whose value head sends gradient to its trunk at once."""
    config = {"output_dir": str(folder), "report_to": "none", "use_cpu": torch.device(device).type == "cpu"}
    config |= {"batch_size": 4, "mini_batch_size": 4, "ppo_epochs": 1, "max_grad_norm": 1.0, **options}
    model = tiny_model() if model is None else model
    trainer = APATrainer(APAConfig(**config), model, tokenizer=tiny_tokenizer(), **(trainer_kwargs or {}))
    assert trainer.accelerator.device.type == torch.device(device).type
    generator = torch.Generator().manual_seed(1)
    head = getattr(trainer.model.value_model, "head", None)
    if hasattr(head, "out"):
        head.out.weight.data.copy_(torch.randn(head.out.weight.shape, generator=generator))
    return trainer


def small_llama(dtype=torch.float32, **options):
    """Wide enough for kernels that want heads and layers of some size."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    config = LlamaConfig(**SHARED, **sizes, max_position_embeddings=64)
    return AutoModelForCausalLM.from_config(config, dtype=dtype, **options)


def movement(trainer, steps=1):
    """What the first of `steps` steps that moves anything changes: all parameters in one vector, float32."""

    def vector(parameters):
        return torch.cat([parameter.flatten().float().cpu() for parameter in parameters.values()])

    before = vector({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
    for _ in range(steps):
        change = vector(parameters_after_step(trainer, *tiny_rollouts())) - before
        if change.any():
            break
    return change


def relative(change, expected):
    return float((change - expected).norm() / expected.norm())


# ---- the vocabulary head fused with the softmax ----


@pytest.fixture
def kernel(monkeypatch):
    """The head is fused: by Triton on a GPU and under its interpreter, by its counterpart in torch elsewhere."""
    if not ON_GPU:
        monkeypatch.setattr(fused_head, "runs_kernel", lambda device: True)
        monkeypatch.setattr(fused_head, "_CHUNKED_LOGPROB_CHUNK_SIZE", 1500)
        if is_triton_available() and os.environ.get("TRITON_INTERPRET") == "1":
            monkeypatch.setattr("trl.kernels.chunked_logprob._use_triton", lambda device: True)


def head_results(head, hidden, targets, temperature=0.7):
    """Log-probs, entropies, and the gradients of hidden states and head for a loss of APA's form."""
    hidden = hidden.detach().requires_grad_()
    head.zero_grad()
    logprobs_M, entropy_M = logprobs.head_logprobs(head, hidden, targets, temperature, with_entropy=True)
    (logprobs_M + 1).square().mean().backward()
    return [logprobs_M.detach(), entropy_M, hidden.grad, *(parameter.grad.clone() for parameter in head.parameters())]


def softmax_results(head, hidden, targets, temperature=0.7):
    """The same in float64, all at once."""
    hidden = hidden.detach().double().requires_grad_()
    weights = [parameter.detach().double().requires_grad_() for parameter in head.parameters()]
    log_softmax = (torch.nn.functional.linear(hidden, *weights) / temperature).log_softmax(-1)
    logprobs_M = log_softmax.gather(-1, targets[:, None])[:, 0]
    (logprobs_M + 1).square().mean().backward()
    entropy_M = -(log_softmax.exp() * log_softmax).sum(-1).detach()
    return [logprobs_M.detach(), entropy_M, hidden.grad, *(weight.grad for weight in weights)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_the_fused_head_is_no_farther_from_float64_than_the_chunks(monkeypatch, kernel, dtype, bias):
    """Several tiles of tokens and of words, the last of each not full."""
    tokens, hidden_size, words = (4500, 128, 70_000) if ON_GPU else (9, 16, 3300)
    torch.manual_seed(0)
    head = torch.nn.Linear(hidden_size, words, bias=bias, device=DEVICE, dtype=dtype)
    hidden = 3 * torch.randn(tokens, hidden_size, device=DEVICE, dtype=dtype)
    targets = torch.arange(tokens, device=DEVICE) * (words // tokens)
    assert fused_head.can_fuse(head, hidden)
    fused = head_results(head, hidden, targets)
    with monkeypatch.context() as patched:
        patched.setattr(logprobs, "can_fuse", lambda head, hidden: False)
        patched.setattr(logprobs, "LOGITS_AT_ONCE", 4 * words)
        in_chunks = head_results(head, hidden, targets)
    exact = softmax_results(head, hidden, targets)
    for name, ours, theirs, expected in zip(
        ("log-probs", "entropies", "hidden", "weight", "bias"), fused, in_chunks, exact, strict=False
    ):
        rounding = 1e-5 if dtype == torch.float32 else 5e-3
        error, of_chunks = relative(ours.double(), expected), relative(theirs.double(), expected)
        assert error < max(1.5 * of_chunks, rounding), f"{name}: {error:.1e}, chunks {of_chunks:.1e}"


# ---- packed rows in one launch a layer ----


@pytest.fixture
def at_once(monkeypatch):
    """Packed rows in half precision attend in one launch: torch's kernel on a GPU, its stand-in elsewhere."""
    if not ON_GPU:
        as_if_on_a_gpu(monkeypatch)
        monkeypatch.setattr(layouts, "launches_cost", lambda device: True)
    monkeypatch.setattr(trial_memory, "_OF_EQUAL_NETWORKS", {})
    kernel, calls = varlen.varlen_attn, []

    @functools.wraps(kernel)  # whose signature says what that of this torch can do
    def counted(*args, **kwargs):
        calls.append(len(args[0]))
        return kernel(*args, **kwargs)

    monkeypatch.setattr(varlen, "varlen_attn", counted)
    return calls


def attended(states, row, window):
    """Outputs of attention and gradients of its inputs, for the same weights of each output."""
    states = [part.detach().requires_grad_() for part in states]
    module = torch.nn.Module()
    module.num_key_value_groups = states[0].shape[1] // states[1].shape[1]
    output, _ = packing.attend_per_sequence(module, *states, None, packed_row=row, sliding_window=window)
    weights = torch.linspace(-1, 1, output.numel(), device=DEVICE, dtype=torch.float64).view_as(output)
    (output * weights.to(output.dtype)).sum().backward()
    return [output.detach(), *(part.grad for part in states)]


@pytest.mark.parametrize("window", [None, 100], ids=["all", "window"])
@pytest.mark.parametrize("heads", [4, 1], ids=["heads", "grouped heads"])
@pytest.mark.parametrize("prompts", [None, (0, 200, 200, 0, 90)], ids=["apart", "shared"])
def test_one_launch_is_no_farther_from_float64_than_one_a_sequence(monkeypatch, at_once, prompts, heads, window):
    """Sequences of less than a block of the kernel and of more; behind a shared prompt fewer queries than keys."""
    row = packing.PackedRow((300, 40, 131, 97, 1), prompts)
    torch.manual_seed(0)
    states = [torch.randn(1, count, 569, 64, device=DEVICE, dtype=torch.float64) for count in (4, heads, heads)]
    half = [part.bfloat16() for part in states]
    found = attended(half, row, window)
    assert at_once == [569]
    with monkeypatch.context() as patched:
        patched.setattr(varlen, "is_for_flash", lambda *states: False)
        one_by_one = attended(half, row, window)
        exact = attended([part.double() for part in half], row, window)
    assert at_once == [569]
    for name, ours, theirs, expected in zip(
        ("outputs", "queries", "keys", "values"), found, one_by_one, exact, strict=True
    ):
        error, of_calls = relative(ours.double(), expected), relative(theirs.double(), expected)
        assert error < max(1.5 * of_calls, 5e-3), f"{name}: {error:.1e}, a launch a sequence {of_calls:.1e}"


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("flash_attention_2", marks=needs_flash)])
@pytest.mark.parametrize("window", [None, 8], ids=["all", "window"])
def test_a_step_on_a_common_prompt_takes_one_launch_a_layer(tmp_path, monkeypatch, at_once, window, attention):
    """In bfloat16, eight responses to each of two prompts; the change is that of float32 with padding."""
    allow(monkeypatch, True)
    torch.manual_seed(2)
    prompts = torch.randint(2, VOCABULARY, (2, 20)).repeat_interleave(8, dim=0)
    responses = [torch.randint(2, VOCABULARY, (length,)) for length in [3, 9, 5, 1, 12, 7, 2, 6] * 2]
    rows = list(prompts.unbind()), responses, list(torch.linspace(-1, 1, 16).unbind())
    changes, options = [], {**SGD, "batch_size": 16, "mini_batch_size": 8, "shuffle": "groups"}
    for bf16, padding_free in ((False, False), (True, True)):
        sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
        config = MistralConfig(**SHARED, **sizes, num_key_value_heads=2, head_dim=32, sliding_window=window)
        torch.manual_seed(0)
        plain = AutoModelForCausalLM.from_config(config)
        given = {"dtype": torch.bfloat16, "attn_implementation": attention} if bf16 else {}
        model = AutoModelForCausalLM.from_config(config, **given).float()
        model.load_state_dict(plain.state_dict())
        trainer = trainer_on(DEVICE, tmp_path, model, **{**options, "bf16": bf16, "padding_free": padding_free})
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        at_once.clear()
        after = parameters_after_step(trainer, *rows)
        changes.append(torch.cat([(after[name] - before[name]).flatten().float().cpu() for name in before]))
    assert trainer.layouts(32, share=True) is Layout.SHARED
    # Policy, pi_init and values of two micro-batches before the update or in it, two layers; 20 + 45 tokens.
    if attention == "sdpa":
        assert set(at_once) == {65} and len(at_once) >= 2 * 2 * 3
    assert relative(changes[1], changes[0]) < 0.1


# ---- the same numbers as on the CPU, in each precision ----


@pytest.mark.parametrize("loss_type", ["apa", "ppo", "awr"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_is_that_of_the_cpu(tmp_path, family, loss_type):
    """Parameters and statistics after two epochs in float32; log-probs and gradients are all that moves them."""
    options = {**SGD, "ppo_epochs": 2, "loss_type": loss_type}
    moved, stats = [], []
    for device in ("cpu", DEVICE):
        trainer = trainer_on(device, tmp_path, tiny_model(family), **options)
        before = {name: p.detach().cpu().clone() for name, p in trainer.model.named_parameters()}
        stats.append(trainer.step(*tiny_rollouts()))
        after = {name: p.detach().cpu() for name, p in trainer.model.named_parameters()}
        moved.append({name: after[name] - before[name] for name in before})
    assert max(float(change.abs().max()) for change in moved[0].values()) > 1e-3
    assert_same(moved[1], moved[0], tolerance=1e-5)
    for name in ("objective/kl", "apa/policy/entropy"):
        assert float(stats[1][name]) == pytest.approx(float(stats[0][name]), abs=1e-4), name


@pytest.mark.parametrize("options", [{}, {"lora": True}, {"gradient_checkpointing": True}], ids=str)
def test_a_step_in_bfloat16_is_that_of_float32_but_for_rounding(tmp_path, options):
    config = {name: value for name, value in options.items() if name != "lora"}
    results = []
    for bf16 in (False, True):
        kwargs = {"peft_config": lora_config(), "value_model": "adapter"} if "lora" in options else None
        trainer = trainer_on(DEVICE, tmp_path, small_llama(), kwargs, **{**SGD, "bf16": bf16, **config})
        results.append(movement(trainer))
    expected, actual = results
    assert expected.norm() > 1e-3 and actual.isfinite().all()
    assert relative(actual, expected) < 0.1


@needs_gpu
def test_a_step_in_float16_is_that_of_float32_but_for_rounding(tmp_path):
    """The scale of the gradient starts too high, and halves at each step that overflows."""
    expected = movement(trainer_on(DEVICE, tmp_path, small_llama(), **SGD))
    actual = movement(trainer_on(DEVICE, tmp_path, small_llama(), **{**SGD, "fp16": True}), steps=16)
    assert actual.any() and relative(actual, expected) < 0.05


@needs_flash
def test_flash_attention_is_no_farther_from_float32_than_sdpa(tmp_path):
    """Packed rows of several lengths, forward and backward."""
    expected = movement(trainer_on(DEVICE, tmp_path, small_llama(), **SGD))
    errors = {}
    for attention in ("sdpa", "flash_attention_2"):
        model = small_llama(torch.bfloat16, attn_implementation=attention).float()
        model.load_state_dict(small_llama().state_dict())
        trainer = trainer_on(DEVICE, tmp_path, model, **{**SGD, "bf16": True})
        assert trainer._packed
        errors[attention] = relative(movement(trainer), expected)
    assert errors["flash_attention_2"] < max(2 * errors["sdpa"], 0.02), errors


@pytest.mark.parametrize(("quantization", "rounding"), [("8bit", 0.05), ("4bit", 0.3)])
def test_adapters_learn_on_a_quantised_base(tmp_path, quantization, rounding):
    """It says about what the base in full says, and each network learns through its own adapter."""
    pytest.importorskip("bitsandbytes")
    base = small_llama()
    base.save_pretrained(tmp_path / "base")
    policy = load_policy(str(tmp_path / "base"), quantization=quantization, lora=4, dtype=torch.bfloat16)
    ids = torch.arange(2, VOCABULARY)[None]
    with torch.no_grad():
        expected, actual = base(ids).logits, policy(ids.to(policy.device)).logits.float().cpu()
    assert relative(actual, expected) < rounding
    kwargs = {"value_model": "adapter"}
    trainer = trainer_on(DEVICE, tmp_path, policy, kwargs, bf16=True, learning_rate=1e-2, max_completion_length=5)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    queries = tiny_rollouts()[0]
    for _ in range(2):
        responses = trainer.generate(queries, return_prompt=False)
        stats = trainer.step(queries, responses, tiny_rollouts()[2])
        assert all(torch.isfinite(torch.as_tensor(value)).all() for value in stats.values() if not _is_text(value))
    moved = {name for name, p in trainer.model.named_parameters() if p.requires_grad and not p.equal(before[name])}
    assert moved == set(before)


def _is_text(value):
    return isinstance(value, (str, list))


# ---- sampling ----


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "t5"])
def test_what_is_sampled_is_what_the_forward_pass_says(tmp_path, monkeypatch, family, bf16):
    """The checks of `trl-apa check` but those of memory, in which a tiny network is lost beside cuBLAS' workspaces."""
    checks = tuple(check for check in run.CHECKS if check not in (memory.weights, memory.micro_batch))
    monkeypatch.setattr(run, "CHECKS", checks)
    trainer = trainer_on(DEVICE, tmp_path, tiny_model(family), bf16=bf16, max_completion_length=8)
    report = trainer.check(["w2 w3 w4", "w5", "w6 w7 w8 w9 w10 w11"])
    assert report.ok, str(report)
    if not bf16:
        assert report["log-probs, sampled with cache"].figures["max_nats"] < 1e-3, str(report)


# ---- resuming ----


def test_rows_that_are_left_are_sampled_from_generates_random_numbers(tmp_path, monkeypatch):
    """`torch.multinomial` has a kernel of its own on a GPU: the choice of `RowChoice` has to be that one's too."""
    probabilities_BV = torch.randn(7, 50257, device=DEVICE).softmax(dim=-1)
    for seed in range(5):
        torch.manual_seed(seed)
        expected = torch.multinomial(probabilities_BV, 1)[:, 0]
        torch.manual_seed(seed)
        noise_BV = torch.empty_like(probabilities_BV).exponential_()
        assert torch.equal((probabilities_BV / noise_BV).argmax(dim=-1), expected)
    queries = tiny_rollouts(12, seed=3)[0]
    trainer = trainer_on(DEVICE, tmp_path, max_completion_length=30)
    found = []
    for dropping in (True, False):
        if not dropping:
            monkeypatch.setattr(generation, "rows_can_be_selected", lambda *given: False)
        torch.manual_seed(5)
        found.append(trainer.generate(queries, return_prompt=False, batch_size=12, stop_strings=["w5"]))
    assert all(map(torch.equal, *found)) and len({len(response) for response in found[0]}) > 1


@pytest.mark.parametrize("stop", [1, 4])
def test_a_resumed_run_has_the_bits_of_one_that_never_stopped(tmp_path, stop):
    """Sampling draws its random numbers from the device: their state is in the checkpoint too."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        whole = trained(tmp_path / "whole")
        again = trained(tmp_path / "again")
        assert_same(again, whole, tolerance=1e-30)  # or no resumed run could have them either
        trained(tmp_path / "cut", callbacks=[StopAt(stop)])
        resumed = trained(tmp_path / "cut", resume=str(tmp_path / "cut" / f"checkpoint-{stop}"))
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(resumed, whole, tolerance=1e-30)


def trained(folder, resume=None, callbacks=None):
    options = {"max_completion_length": 5, "logging_steps": 1, "save_strategy": "no", "max_steps": 6, "seed": 3}
    rows = {"train_dataset": Dataset.from_dict({"prompt": PROMPTS}), "reward_funcs": few_nines, "callbacks": callbacks}
    options |= {"mini_batch_size": 2, "ppo_epochs": 2, "learning_rate": 1e-2, "disable_tqdm": True}
    trainer = trainer_on(DEVICE, folder, None, rows, **options)
    trainer.train(resume_from_checkpoint=resume)
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


# ---- what the host waits for ----


# torch's own words, of each; when the mode is set it says once that it may miss some.
WAITED = "called a synchronizing CUDA operation"


class SyncDebug(warnings.catch_warnings):
    """Notes in `seen` what CUDA says the host waited for."""

    def __init__(self):
        super().__init__(record=True)
        self.seen = []

    def __enter__(self):
        self._caught = super().__enter__()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        return self

    def __exit__(self, *error):
        torch.cuda.set_sync_debug_mode("default")
        self.seen += [str(warning.message) for warning in self._caught if WAITED in str(warning.message)]
        super().__exit__(*error)


@needs_gpu
def test_waits_are_counted():
    with SyncDebug() as debug:
        torch.ones(2, device=DEVICE).sum().item()
        torch.ones(2, device=DEVICE).sum().item()
    assert len(debug.seen) == 2


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_no_optimizer_step_waits_for_the_device(tmp_path, bf16):
    """Two epochs of two steps of two micro-batches, after an iteration in which kernels are compiled."""
    trainer = trainer_on(DEVICE, tmp_path, bf16=bf16, optim="adamw_torch_fused", **FOUR_STEPS)
    trainer.step(*tiny_rollouts())
    given = (trainer, "_prepare_iteration", "_finish_iteration", lambda: trainer.step(*tiny_rollouts()))
    if ON_GPU:
        debug = SyncDebug()
        between(*given, debug)
        assert debug.seen == []
    else:
        assert waits_between(*given) == []


# ---- two GPUs ----


TWO_EPOCHS = {**SGD, "ppo_epochs": 2, "scale_rewards": True, "batch_size": 4}


def step_on_half(rank, folder, device):
    announce_rank(rank)
    trainer = trainer_on(device, folder, **TWO_EPOCHS)
    parameters = parameters_after_step(
        trainer, *([column[row] for row in rows_of(rank)] for column in tiny_rollouts(8))
    )
    assert trainer.accelerator.num_processes == 2
    return {name.removeprefix("module."): parameter.cpu() for name, parameter in parameters.items()}


@pytest.mark.skipif(ON_GPU and torch.cuda.device_count() < 2, reason="one GPU: NCCL wants one for each rank")
def test_two_ranks_are_one_process_on_all_rows(tmp_path):
    """NCCL and two GPUs beside the CPU; gloo where it is rehearsed."""
    ranks = run_in_two_processes(step_on_half, tmp_path, DEVICE.type, backend="nccl" if ON_GPU else "gloo")
    options = {**TWO_EPOCHS, "batch_size": 8, "mini_batch_size": 8}
    expected = parameters_after_step(trainer_on("cpu", tmp_path, **options), *tiny_rollouts(8))
    assert_same(ranks[1], ranks[0], tolerance=1e-30)
    assert_same(ranks[0], expected, tolerance=1e-5)
