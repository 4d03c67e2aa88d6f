"""`turn_discount` and `gae_over`: from the options to the advantages that `train` and `step` learn from."""

import pytest
import torch

from tests.test_advantages import naive_turn_discount, naive_turn_gae
from tests.test_environments import Game
from tests.test_tools import collected, length_reward
from tests.tiny import tiny_config, tiny_rollouts, tiny_trainer
from tests.tool_dialogues import add, ask, call, tool_trainer
from trl_apa.algorithms.advantages import ends_of_turns
from trl_apa.config.apa import DEFINES_RUN


NAIVE = {"tokens": naive_turn_discount, "turns": naive_turn_gae}
CREDIT = [{"turn_discount": 0.7}, {"gae_over": "turns"}, {"gae_over": "turns", "turn_discount": 0.7, "gamma": 0.9}]
PLAIN = {"whiten_advantages": False, "ppo_epochs": 1, "learning_rate": 1e-3, "max_steps": 2}


def naive(rollouts, mask, config):
    """In float64, of the rewards and values that a trainer had."""
    given = rollouts.rewards_BR.double(), rollouts.values_BR.double(), mask
    return NAIVE[config.gae_over](*given, config.gamma, config.gae_lambda, config.turn_discount)


@pytest.mark.parametrize("options", CREDIT)
def test_train_credits_turns_as_the_options_say(tmp_path, options):
    turns = {"one?": [call("move", points=1), call("move", points=2), "Done."], "two?": ["Done at once."]}
    trainer, _ = tool_trainer(
        tmp_path, turns, ask("one?", "two?"), environment_factory=Game, config={**PLAIN, **options}
    )
    kept = collected(trainer)
    trainer.train()
    assert len(kept) == 2  # in the second iteration the critic says something
    rollouts = trainer.run_state.iteration.rollouts
    mask = torch.nn.utils.rnn.pad_sequence(kept[-1][3], batch_first=True).bool()
    assert torch.equal(rollouts.response_mask_BR, mask)
    assert sorted(ends_of_turns(mask).sum(dim=1).tolist()) == [1, 3]
    advantages, returns = naive(rollouts, mask, trainer.config)
    torch.testing.assert_close(rollouts.advantages_BR.double(), advantages, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rollouts.returns_BR.double(), returns, rtol=1e-5, atol=1e-5)


def test_turns_with_an_empty_answer_between_them_are_two(tmp_path):
    def forget() -> str:
        """Says nothing."""
        return ""

    turns = {"one?": [call("forget"), "Done."]}
    trainer, _ = tool_trainer(
        tmp_path, turns, ask("one?"), reward=length_reward, tools=[forget], config={**PLAIN, "gae_over": "turns"}
    )
    kept = collected(trainer)
    trainer.train()
    [mask] = kept[0][3]
    assert ends_of_turns(mask[None]).sum() == 2
    advantages = trainer.run_state.iteration.rollouts.advantages_BR[0][mask]
    assert len(set(advantages.tolist())) == 2


def with_gaps():
    queries, responses, scores = tiny_rollouts()
    masks = [torch.ones_like(response) for response in responses]
    masks[0][1:3] = 0
    masks[3][2] = 0
    return queries, responses, scores, masks


@pytest.mark.parametrize("options", CREDIT)
def test_step_credits_turns_by_its_response_masks(tmp_path, options):
    trainer = tiny_trainer(tmp_path, whiten_advantages=False, **options)
    torch.nn.init.normal_(trainer.model.value_model.head.out.weight)
    *rollouts, masks = with_gaps()
    trainer.step(*rollouts, masks)
    made = trainer.run_state.iteration.rollouts
    mask = torch.nn.utils.rnn.pad_sequence(masks, batch_first=True).bool()
    advantages, returns = naive(made, mask, trainer.config)
    torch.testing.assert_close(made.advantages_BR.double(), advantages, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(made.returns_BR.double(), returns, rtol=1e-5, atol=1e-5)


def weights_after_two_steps(folder, masked, micro_batch=4, **options):
    trainer = tiny_trainer(
        folder, optim="sgd", learning_rate=0.1, mini_batch_size=micro_batch,
        gradient_accumulation_steps=4 // micro_batch, **options,
    )  # fmt: skip
    torch.manual_seed(1)
    torch.nn.init.normal_(trainer.model.value_model.head.out.weight)
    *rollouts, masks = with_gaps()
    for _ in range(2):
        trainer.step(*rollouts, masks if masked else None)
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


def test_responses_of_one_turn_are_learned_from_as_before_to_the_bit(tmp_path):
    plain, discounted = (weights_after_two_steps(tmp_path, False, turn_discount=d) for d in (1.0, 0.3))
    assert all(torch.equal(one, other) for one, other in zip(plain, discounted, strict=True))
    plain, discounted = (weights_after_two_steps(tmp_path, True, turn_discount=d) for d in (1.0, 0.3))
    assert not all(torch.equal(one, other) for one, other in zip(plain, discounted, strict=True))


@pytest.mark.parametrize("options", CREDIT)
def test_the_split_into_micro_batches_does_not_matter(tmp_path, options):
    whole, parts = (weights_after_two_steps(tmp_path, True, micro_batch=size, **options) for size in (4, 1))
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{"turn_discount": 0.5}, {"gae_over": "turns"}])
@pytest.mark.parametrize("estimator", ["group", "leave_one_out", "batch"])
def test_estimators_without_a_critic_say_that_they_do_not_read_it(tmp_path, options, estimator):
    ((name, value),) = options.items()
    text = f"{name}={value!r} has no effect with advantage_estimator='{estimator}': only 'gae' reads it"
    with pytest.warns(UserWarning, match=text):
        tiny_config(tmp_path, advantage_estimator=estimator, **options)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"turn_discount": 1.5}, "turn_discount=1.5: it should be between 0 and 1"),
        ({"turn_discount": -0.1}, "turn_discount=-0.1"),
        ({"gae_over": "responses"}, "gae_over='responses': it should be 'tokens' or 'turns'"),
    ],
)
def test_values_that_cannot_be_are_refused_at_construction_and_later(tmp_path, options, problem):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=problem):
        tiny_config(tmp_path, **options)
    made = tiny_config(tmp_path)
    with pytest.raises(ValueError, match=problem):
        setattr(made, name, value)


def test_they_define_a_run(tmp_path):
    assert {"turn_discount", "gae_over"} < set(DEFINES_RUN)
    turns, options = {"one?": [call("add", a=1, b=2), "3."]}, {**PLAIN, "save_strategy": "steps", "save_steps": 1}
    given = {"reward": length_reward, "tools": [add]}
    tool_trainer(tmp_path, turns, ask("one?"), config=options, **given)[0].train()
    other, _ = tool_trainer(tmp_path, turns, ask("one?"), config={**options, "turn_discount": 0.5}, **given)
    with pytest.raises(ValueError, match=r"turn_discount was 1.0, is 0.5"):
        other.train(resume_from_checkpoint=True)
