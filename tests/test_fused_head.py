"""The vocabulary head fused with the softmax: the numbers of the head and a softmax, without their logits.

Its Triton kernel needs a GPU. Where `fused` is asked for, the CPU is taken for a device that runs it: TRL's function
is the same there, with torch folding the tiles.
"""

import bitsandbytes
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import get_peft_model
from torch.nn.utils import parametrizations

from tests.test_update import assert_same, learner, parameters_after_step
from tests.tiny import lora_config, tiny_model, tiny_rollouts
from trl_apa.models import fused_head, logprobs
from trl_apa.models.fused_head import can_fuse
from trl_apa.models.logprobs import head_logprobs


TOKENS, HIDDEN, WORDS = 7, 8, 50
COEFFICIENTS = torch.linspace(-1, 1, TOKENS)


@pytest.fixture
def fused(monkeypatch):
    """Heads that can be fused are, in tiles of 3 tokens and 16 words; returns the widths of those that were."""
    monkeypatch.setattr(fused_head, "runs_kernel", lambda device: True)
    monkeypatch.setattr(fused_head, "_CHUNKED_LOGPROB_CHUNK_SIZE", 16)
    monkeypatch.setattr("trl.kernels.chunked_logprob.TOKEN_CHUNK_SIZE", 3)
    widths, function = [], logprobs.fused_logprobs

    def noted(head, *args):
        widths.append(head.out_features)
        return function(head, *args)

    monkeypatch.setattr(logprobs, "fused_logprobs", noted)
    return widths


def made(bias=True, dtype=torch.float32):
    """A head whose words are far apart, hidden states and targets in every tile."""
    torch.manual_seed(0)
    head = torch.nn.Linear(HIDDEN, WORDS, bias=bias, dtype=dtype)
    with torch.no_grad():
        head.weight.mul_(4)
    hidden = torch.randn(TOKENS, HIDDEN, dtype=dtype, requires_grad=True)
    return head, hidden, torch.arange(TOKENS) * 8


def outcome(head, hidden, targets, with_entropy=True, log_probs=head_logprobs):
    """Log-probs, entropies and the gradients of a loss of APA's form, where there are any."""
    logprobs_M, entropy_M = log_probs(head, hidden, targets, 0.7, with_entropy)
    assert entropy_M is None or not entropy_M.requires_grad
    (logprobs_M + COEFFICIENTS).square().sum().backward()
    results = [logprobs_M.detach(), entropy_M, hidden.grad, *(parameter.grad for parameter in head.parameters())]
    hidden.grad = None
    head.zero_grad()
    return results


def by_softmax(head, hidden, targets, temperature, with_entropy):
    """In float64, all at once."""
    weight, bias = head.weight.double(), 0.0 if head.bias is None else head.bias.double()
    log_softmax = ((hidden.double() @ weight.T + bias) / temperature).log_softmax(-1)
    entropy = -(log_softmax.exp() * log_softmax).sum(-1).detach() if with_entropy else None
    return log_softmax[torch.arange(len(targets)), targets], entropy


def assert_close(actual, expected):
    """To float32's accuracy of numbers up to 20."""
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours is None) is (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, check_dtype=False, rtol=1e-5, atol=5e-5)


def test_two_words_by_hand(fused):
    """Logits (ln 3, 0) over 1: probabilities 3/4 and 1/4. At 1/2 the odds are squared: 9/10 and 1/10.

    d log p_0 / d logits = (1 - 9/10, 0 - 1/10) / (1/2) = (0.2, -0.2), and the weights are the identity.
    """
    head = torch.nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.eye(2))
    hidden = torch.tensor([[3.0, 1.0]]).log().requires_grad_()
    expected = torch.tensor([3 / 4]).log()
    torch.testing.assert_close(head_logprobs(head, hidden, torch.tensor([0]))[0], expected)
    logprobs_M, entropy_M = head_logprobs(head, hidden, torch.tensor([0]), temperature=0.5, with_entropy=True)
    torch.testing.assert_close(logprobs_M, torch.tensor([0.9]).log())
    surprises = -torch.tensor([0.9, 0.1]).log()
    torch.testing.assert_close(entropy_M, torch.tensor([0.9, 0.1]) @ surprises[:, None])
    logprobs_M.sum().backward()
    torch.testing.assert_close(hidden.grad, torch.tensor([[0.2, -0.2]]))
    assert fused == [2, 2]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("with_entropy", [True, False])
def test_value_and_gradients_are_those_of_the_chunks_and_of_the_softmax(monkeypatch, request, bias, with_entropy):
    """Three tiles of tokens, four of words, the last of each not full; chunks of two tokens."""
    made_up = made(bias)
    monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", 2 * WORDS)
    in_chunks = outcome(*made_up, with_entropy)
    expected = outcome(*made_up, with_entropy, by_softmax)
    widths = request.getfixturevalue("fused")
    actual = outcome(*made_up, with_entropy)
    assert widths == [WORDS] and actual[0].dtype == torch.float32
    assert_close(actual, in_chunks)
    assert_close(actual, expected)


def test_a_frozen_head_gets_no_gradient_and_hands_it_on(fused):
    head, hidden, targets = made()
    expected = outcome(head, hidden, targets)
    head.requires_grad_(False)
    actual = outcome(head, hidden, targets)
    assert_close(actual[:3], expected[:3])
    assert actual[3:] == [None, None] and fused == [WORDS] * 2


@pytest.mark.parametrize("autocast", [True, False])
def test_in_bfloat16_it_is_no_farther_from_float64_than_the_chunks(monkeypatch, request, autocast):
    """A network in bfloat16, and one in float32 under autocast: in both, products are rounded to bfloat16."""
    made_up = made(bias=False, dtype=torch.float32 if autocast else torch.bfloat16)
    expected = outcome(*made_up, log_probs=by_softmax)
    monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", 2 * WORDS)
    errors = []
    for chunks in (True, False):
        if not chunks:
            request.getfixturevalue("fused")
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            results = outcome(*made_up)
        assert results[0].dtype == results[1].dtype == torch.float32
        assert [gradient.dtype for gradient in results[2:]] == [made_up[0].weight.dtype] * 2
        errors.append([float((ours - exact).norm()) for ours, exact in zip(results, expected, strict=True)])
    for of_chunks, of_tiles in zip(*errors, strict=True):
        assert 0 < of_tiles < 1.1 * of_chunks


def test_no_tokens_give_no_numbers_and_a_gradient_of_zero(fused):
    head, hidden, targets = made()
    logprobs_M, entropy_M = head_logprobs(head, hidden[:0], targets[:0], with_entropy=True)
    assert logprobs_M.shape == entropy_M.shape == (0,)
    logprobs_M.sum().backward()
    assert not hidden.grad.any() and not head.weight.grad.any() and fused == [WORDS]


def test_no_tensor_as_wide_as_the_vocabulary_waits_for_the_backward_pass(fused):
    head, hidden, targets = made()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape), lambda tensor: tensor):
        head_logprobs(head, hidden, targets, 0.7, with_entropy=True)
    assert kept and not any(shape == (TOKENS, WORDS) for shape in kept)


@pytest.mark.parametrize("options", [{}, {"tie": True}, {"lora": True}], ids=["full", "tied", "lora"])
def test_a_step_is_the_default_one(tmp_path, request, options):
    """Two epochs of micro-batches, with a head that is trained, one tied to the embedding, and one that is frozen."""
    results = []
    for is_fused in (False, True):
        widths = request.getfixturevalue("fused") if is_fused else []
        model = tiny_model()
        if "tie" in options:
            model.lm_head.weight = model.model.embed_tokens.weight
        kwargs = {"peft_config": lora_config()} if "lora" in options else None
        config = {"ppo_epochs": 2, "mini_batch_size": 2, "gradient_accumulation_steps": 2, "temperature": 0.7}
        trainer = learner(tmp_path, model, kwargs, **config)
        before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
        results.append(parameters_after_step(trainer, *tiny_rollouts()))
        assert max(float((results[-1][name] - old).abs().max()) for name, old in before.items()) > 1e-3
        assert (len(widths) > 0) is is_fused
    assert_same(*results)


def adapted_head():
    model = get_peft_model(tiny_model(), lora_config(target_modules=["lm_head"]))
    return model.get_base_model().get_output_embeddings()


def saved_head():
    model = get_peft_model(tiny_model(), lora_config(modules_to_save=["lm_head"]))
    return model.get_base_model().get_output_embeddings()


def plain_head():
    return torch.nn.Linear(HIDDEN, WORDS)


def hooked_head():
    head = plain_head()
    head.register_forward_hook(lambda head, args, logits: logits.clamp(max=1.0))
    return head


def head_on_a_device_of_its_own():
    return add_hook_to_module(plain_head(), AlignDevicesHook("cpu"))


def scaled_head():
    class Scaled(torch.nn.Linear):
        def forward(self, hidden):
            return 0.5 * super().forward(hidden)

    return Scaled(HIDDEN, WORDS)


OTHER_HEADS = {
    "an adapter": adapted_head,
    "a copy that is trained": saved_head,
    "8 bits": lambda: bitsandbytes.nn.Linear8bitLt(HIDDEN, WORDS, has_fp16_weights=False),
    "4 bits": lambda: bitsandbytes.nn.Linear4bit(HIDDEN, WORDS),
    "a hook": hooked_head,
    "a device of its own": head_on_a_device_of_its_own,
    "a scale": scaled_head,
    "a parametrised weight": lambda: parametrizations.weight_norm(plain_head()),
    "two layers": lambda: torch.nn.Sequential(plain_head()),
}


@pytest.mark.parametrize("kind", OTHER_HEADS)
def test_any_other_head_computes_its_logits_itself(fused, kind):
    assert not can_fuse(OTHER_HEADS[kind](), torch.zeros(1, HIDDEN))


def test_a_plain_head_is_fused_but_for_float64(fused):
    assert can_fuse(plain_head(), torch.zeros(1, HIDDEN))
    assert not can_fuse(plain_head().double(), torch.zeros(1, HIDDEN, dtype=torch.float64))


def test_on_a_cpu_no_head_is_fused():
    assert not can_fuse(plain_head(), torch.zeros(1, HIDDEN))
