"""A trial is made once for networks that compute the same, and anew for what may compute something else."""

import random

import numpy as np
import pytest
import torch
from peft import get_peft_model

from tests.tiny import lora_config, tiny_model, tiny_trainer
from trl_apa.models import layouts, network_identity, trial_memory
from trl_apa.models.layouts import Layouts, layout_trial, sampling_trial
from trl_apa.models.modes import make_repeatable
from trl_apa.models.network_identity import identity_of
from trl_apa.models.trials import LONG, try_layouts


@pytest.fixture
def made(monkeypatch):
    """The networks of the layout trials that are made, with nothing remembered of other tests."""
    networks = []

    def noted(network, longest, **kwargs):
        networks.append(network)
        return try_layouts(network, longest, **kwargs)

    monkeypatch.setattr(layouts, "try_layouts", noted)
    monkeypatch.setattr(trial_memory, "_OF_EQUAL_NETWORKS", {})
    return networks


def test_equal_networks_are_tried_out_once(made):
    trials = [layout_trial(tiny_model(), LONG) for _ in range(3)]
    assert len(made) == 1 and trials[0] is trials[1] is trials[2]
    adapted = [get_peft_model(tiny_model(), lora_config()) for _ in range(2)]
    for model in adapted:
        torch.manual_seed(2)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter)
        layout_trial(model, LONG)
    assert len(made) == 2


class Noisy(torch.nn.Linear):
    def forward(self, hidden):
        return super().forward(hidden) + torch.randn(())


def with_one_weight_changed(model):
    with torch.no_grad():
        next(model.parameters())[3, 4] += 1e-3


def with_two_weights_swapped(model):
    weight = model.lm_head.weight
    with torch.no_grad():
        weight[2], weight[3] = weight[3].clone(), weight[2].clone()


def with_another_option_of_a_module(model):
    model.model.layers[1].self_attn.scaling *= 2


def with_another_attention(model):
    model.set_attn_implementation("eager")


def with_other_frequencies(model):
    model.model.rotary_emb.inv_freq.mul_(0.5)


def with_another_class(model):
    model.model.layers[0].mlp.down_proj.__class__ = Noisy


def with_a_hook(model):
    model.model.layers[0].register_forward_hook(lambda module, args, output: output * 2)


def with_a_forward_of_its_own(model):
    forward = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda hidden: forward(hidden).flip(0)


def in_another_precision(model):
    model.to(torch.bfloat16)


def in_train_mode(model):
    model.train()


CHANGES = [
    with_one_weight_changed,
    with_two_weights_swapped,
    with_another_option_of_a_module,
    with_another_attention,
    with_other_frequencies,
    with_another_class,
    with_a_hook,
    with_a_forward_of_its_own,
    in_another_precision,
    in_train_mode,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_network_that_may_compute_something_else_is_tried_out_itself(made, change):
    first, other = tiny_model().eval(), tiny_model().eval()
    layout_trial(first, LONG)
    change(other)
    layout_trial(other, LONG)
    assert made == [first, other]


@pytest.mark.parametrize("kind", [set, frozenset])
def test_the_order_of_a_set_makes_no_difference(kind):
    """The order of equal sets depends on how they were filled, and of texts on the process."""
    one, other, third = tiny_model(), tiny_model(), tiny_model()
    one.heads, other.heads, third.heads = kind([0, 8]), kind([8, 0]), kind([0, 9])
    assert list(one.heads) != list(other.heads)
    assert identity_of(one) == identity_of(other) != identity_of(third)


def test_what_other_code_computes_is_not_remembered(made, monkeypatch):
    """Attention functions can be exchanged by name."""
    mapping = network_identity.ALL_ATTENTION_FUNCTIONS._global_mapping
    sdpa = mapping["sdpa"]
    layout_trial(tiny_model(), LONG)
    monkeypatch.setitem(mapping, "sdpa", lambda *args, **kwargs: sdpa(*args, **kwargs))
    layout_trial(tiny_model(), LONG)
    with torch.autocast("cpu", torch.bfloat16):
        layout_trial(tiny_model(), LONG)
    assert len(made) == 3


def test_large_networks_are_not_compared(monkeypatch):
    assert identity_of(tiny_model()) is not None
    monkeypatch.setattr(network_identity, "MOST_BYTES", 1000)
    assert identity_of(tiny_model()) is None
    with torch.device("meta"):
        assert identity_of(tiny_model()) is None


def test_an_error_is_that_of_one_network(made):
    def broken(*args, **kwargs):
        raise RuntimeError("no kernel")

    for _ in range(2):
        model = tiny_model()
        model.model.norm.forward = broken
        error = layout_trial(model, LONG)
        assert isinstance(error, RuntimeError) and error.__traceback__ is None
        assert layout_trial(model, LONG) is error
    assert len(made) == 2


def test_the_second_trainer_of_equal_networks_makes_no_trial(made, tmp_path):
    tiny_trainer(tmp_path)
    kinds = len(made)
    tiny_trainer(tmp_path)
    assert len(made) == kinds == 2  # language model and trunk of the value model


def test_a_trial_leaves_networks_and_random_numbers_as_they_were(made):
    model = tiny_model()
    make_repeatable(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    Layouts([model])
    sampling_trial(model, LONG)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert modes == [module.training for module in model.modules()]
    assert all(parameter.grad is None for parameter in model.parameters())
