"""`step` against the formulas written out: same parameters afterwards, whatever the padding, order and split."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny import ENCODER_DECODERS, FAMILIES, START, tiny_model, tiny_rollouts, tiny_trainer
from trl_apa.algorithms.masking import masked_mean
from trl_apa.trainer.preparation import rewards_of_tokens


def row_outputs(model, query, response):
    """Hidden states or logits of one unpadded sequence at the positions that predict its response."""
    if model.config.is_encoder_decoder:
        decoder_ids = torch.cat([torch.tensor([START]), response[:-1]])
        return model(input_ids=query[None], decoder_input_ids=decoder_ids[None])[0][0]
    ids = torch.cat([query, response])[None]
    return model(input_ids=ids)[0][0, len(query) - 1 : -1]


def row_logprobs(policy, query, response, temperature):
    log_softmax = torch.log_softmax(row_outputs(policy, query, response) / temperature, dim=-1)
    return torch.stack([log_softmax[t, token] for t, token in enumerate(response)])


def row_values(value_model, query, response):
    hidden = row_outputs(value_model.network, query, response)
    head = value_model.head
    return (torch.relu(hidden @ head.hidden.weight.T + head.hidden.bias) @ head.out.weight.T + head.out.bias)[:, 0]


def row_advantages(rewards, values, kept, gamma, gae_lambda):
    """Backwards through the kept tokens of one response, in Python floats."""
    advantages, next_advantage, next_value = [0.0] * len(rewards), 0.0, 0.0
    for t in reversed(range(len(rewards))):
        if kept[t]:
            delta = rewards[t] + gamma * next_value - values[t]
            advantages[t] = next_advantage = delta + gamma * gae_lambda * next_advantage
            next_value = values[t]
    return advantages


def reference_step(policy, value_model, config, queries, responses, scores, masks=None):
    """One full-batch update per epoch, row by row and token by token, with torch's AdamW on the plain sum of terms."""
    ref, rows = copy.deepcopy(policy), range(len(queries))
    kept = [[True] * len(r) for r in responses] if masks is None else [[bool(k) for k in mask] for mask in masks]
    with torch.no_grad():
        ref_logprobs = [row_logprobs(ref, queries[i], responses[i], config.temperature) for i in rows]
        old_values = [row_values(value_model, queries[i], responses[i]) for i in rows]
    advantages, returns = [], []
    for i in rows:
        last = max(t for t, keep in enumerate(kept[i]) if keep)
        # The first rollouts are pi_init's own, so PPO's penalty beta * (log pi_old - log pi_init) is zero here.
        rewards = [float(scores[i]) if t == last else 0.0 for t in range(len(responses[i]))]
        row = row_advantages(rewards, old_values[i].tolist(), kept[i], config.gamma, config.gae_lambda)
        advantages.append(torch.tensor(row))
        returns.append(advantages[i] + old_values[i])
    flat = torch.cat([a[torch.tensor(k)] for a, k in zip(advantages, kept, strict=True)])
    if config.whiten_advantages:
        advantages = [(a - flat.mean()) / (flat.var() + 1e-8).sqrt() for a in advantages]
    parameters = [*policy.parameters(), *value_model.parameters()]
    adam = torch.optim.AdamW(parameters, lr=config.learning_rate, eps=config.adam_epsilon, weight_decay=0.0)
    optimizer = torch.optim.SGD(parameters, lr=config.learning_rate) if config.optim == "sgd" else adam
    for _ in range(config.num_epochs_per_batch):
        loss = 0.0
        for i in rows:
            logprobs = row_logprobs(policy, queries[i], responses[i], config.temperature)
            values = row_values(value_model, queries[i], responses[i])
            for t in [t for t, keep in enumerate(kept[i]) if keep]:
                advantage = float(advantages[i][t])
                if config.loss_type == "apa":
                    term = (logprobs[t] - ref_logprobs[i][t] - advantage / config.kl_coef) ** 2
                elif config.loss_type == "awr":
                    term = -torch.exp(torch.tensor(advantage / config.kl_coef)) * logprobs[t]
                else:
                    ratio = torch.exp(logprobs[t] - ref_logprobs[i][t])
                    clipped = ratio.clamp(1 - config.cliprange, 1 + config.cliprange)
                    term = -torch.minimum(ratio * advantage, clipped * advantage)
                loss = loss + term + config.vf_coef * 0.5 * (values[t] - returns[i][t]) ** 2
        (loss / len(flat)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()


def learner(tmp_path, model=None, trainer_kwargs=None, **config):
    """A trainer whose updates are linear in the gradient, and whose value head sends gradient to its trunk at once.

    Adam would turn the rounding of a tiny gradient into a whole step of the learning rate.
    """
    trainer = tiny_trainer(tmp_path, model, trainer_kwargs, **{"optim": "sgd", "learning_rate": 0.1, **config})
    torch.manual_seed(1)
    torch.nn.init.normal_(trainer.model.value_model.head.out.weight)
    return trainer


def parameters_after_step(trainer, *rollouts):
    trainer.step(*rollouts)
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def named_parameters(policy, value_model):
    named = {f"policy.{name}": p.detach() for name, p in policy.named_parameters()}
    return named | {f"value_model.{name}": p.detach() for name, p in value_model.named_parameters()}


def assert_same(actual, expected, tolerance=1e-6):
    """Every parameter, to `tolerance`: parameters move by 0.01 or more in these tests."""
    assert actual.keys() == expected.keys()
    worst = max(actual, key=lambda name: float((actual[name] - expected[name]).detach().abs().max()))
    difference = float((actual[worst] - expected[worst]).detach().abs().max())
    assert difference < tolerance, f"{worst} differs by {difference:.2e}"


@pytest.mark.parametrize("family", FAMILIES + ENCODER_DECODERS)
@pytest.mark.parametrize("loss_type", ["apa", "awr", "ppo"])
def test_step_equals_a_plain_autograd_script_of_the_formulas(tmp_path, family, loss_type):
    """In float64, so that what is left is the float32 in which advantages are kept: 1e-7 of them."""
    options = {"loss_type": loss_type, "ppo_epochs": 2, "mini_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = learner(tmp_path, tiny_model(family, dtype=torch.float64), temperature=0.7, vf_coef=0.5, **options)
    trainer.model.value_model.head.double()
    before = named_parameters(copy.deepcopy(trainer.model.policy), copy.deepcopy(trainer.model.value_model))
    policy, value_model = copy.deepcopy(trainer.model.policy), copy.deepcopy(trainer.model.value_model)
    rollouts = tiny_rollouts()
    actual = parameters_after_step(trainer, *rollouts)
    reference_step(policy, value_model, trainer.config, *rollouts)
    for network in ("policy", "value_model"):
        moved = [float((actual[name] - p).abs().max()) for name, p in before.items() if name.startswith(network)]
        assert max(moved) > 1e-3, network
    assert_same(actual, named_parameters(policy, value_model), tolerance=1e-8)


def test_the_default_optimizer_equals_torch_adamw(tmp_path):
    options = {"optim": "adamw_torch", "learning_rate": 1e-2, "adam_epsilon": 1e-3, "ppo_epochs": 3}
    trainer = learner(tmp_path, tiny_model(dtype=torch.float64), **options)
    trainer.model.value_model.head.double()
    policy, value_model = copy.deepcopy(trainer.model.policy), copy.deepcopy(trainer.model.value_model)
    rollouts = tiny_rollouts()
    actual = parameters_after_step(trainer, *rollouts)
    reference_step(policy, value_model, trainer.config, *rollouts)
    assert_same(actual, named_parameters(policy, value_model), tolerance=2e-6)


def test_step_with_masked_gaps_equals_the_plain_script(tmp_path):
    trainer = learner(tmp_path, tiny_model(dtype=torch.float64))
    trainer.model.value_model.head.double()
    policy, value_model = copy.deepcopy(trainer.model.policy), copy.deepcopy(trainer.model.value_model)
    queries, _, scores = tiny_rollouts()
    responses = [torch.arange(2, 7) + i for i in range(4)]
    masks = [torch.tensor(m) for m in ([1, 0, 0, 1, 1], [1, 1, 1, 1, 0], [0, 1, 0, 1, 0], [1, 1, 1, 1, 1])]
    actual = parameters_after_step(trainer, queries, responses, scores, masks)
    reference_step(policy, value_model, trainer.config, queries, responses, scores, masks)
    assert_same(actual, named_parameters(policy, value_model), tolerance=1e-8)


SPLITS = [
    {"mini_batch_size": 8},
    {"mini_batch_size": 1, "gradient_accumulation_steps": 8},
    {"mini_batch_size": 4, "gradient_accumulation_steps": 2},
]


@pytest.mark.parametrize("loss_type", ["apa", "awr", "ppo"])
def test_the_split_into_micro_batches_does_not_matter(tmp_path, loss_type):
    """Ragged rows: a mean of micro-batch means would weigh short responses more."""
    results = []
    for split in SPLITS:
        trainer = learner(tmp_path, loss_type=loss_type, batch_size=8, ppo_epochs=2, **split)
        stats = trainer.step(*tiny_rollouts(8))
        results.append((dict(trainer.model.named_parameters()), stats))
    for parameters, stats in results[1:]:
        assert_same(parameters, results[0][0])
        for name in stats:
            if not name.startswith("time/"):
                assert stats[name] == pytest.approx(results[0][1][name], rel=2e-4, abs=2e-5), name


def test_row_order_padding_side_and_token_dtype_do_not_matter(tmp_path):
    queries, responses, scores = tiny_rollouts()
    expected = parameters_after_step(learner(tmp_path), queries, responses, scores)
    order = [2, 0, 3, 1]
    trainer = learner(tmp_path)
    trainer.tokenizer.padding_side = "right"
    rollouts = [[column[i] for i in order] for column in (queries, responses, scores)]
    assert_same(parameters_after_step(trainer, *rollouts), expected)
    trainer = learner(tmp_path)
    trainer.tokenizer.padding_side = "left"
    rollouts = [[t.int() for t in queries], [t.short() for t in responses], [s.double().reshape(1) for s in scores]]
    assert_same(parameters_after_step(trainer, *rollouts), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_long_row_beside_a_short_one_does_not_change_the_short_ones_logprobs_and_values(tmp_path, family):
    """Padding of both sides at once: the short row gets 30 pads on the left and 19 on the right."""
    trainer = tiny_trainer(tmp_path, tiny_model(family), batch_size=2, mini_batch_size=2)
    torch.nn.init.normal_(trainer.model.value_model.head.out.weight)
    short, long = (torch.tensor([5, 6]), torch.tensor([7])), (torch.arange(32) % 20 + 3, torch.arange(20) + 4)
    alone = trainer._collect([short[0]], [short[1]], [torch.tensor(1.0)], None)[0]
    both = trainer._collect([short[0], long[0]], [short[1], long[1]], [torch.tensor(1.0)] * 2, None)[0]
    trainer._prepare_for_updates()
    for rollouts in (alone, both):
        trainer._evaluate_rollouts(rollouts)
    torch.testing.assert_close(both.ref_logprobs_BR[0, :1], alone.ref_logprobs_BR[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(both.values_BR[0, :1], alone.values_BR[0], atol=1e-5, rtol=1e-5)


def test_pad_equal_to_eos_trains_as_with_a_pad_of_its_own(tmp_path):
    rollouts = tiny_rollouts()
    expected = parameters_after_step(learner(tmp_path), *rollouts)
    trainer = learner(tmp_path)
    trainer.special_tokens = replace(trainer.special_tokens, pad=1)
    assert_same(parameters_after_step(trainer, *rollouts), expected)


def test_dropout_of_the_model_does_not_reach_the_update(tmp_path):
    rollouts = tiny_rollouts()
    results = []
    for rate in (0.0, 0.5):
        model = tiny_model("opt")
        for module in model.modules():
            if hasattr(module, "dropout"):
                module.dropout = rate
        model.train()
        results.append(parameters_after_step(learner(tmp_path, model), *rollouts))
    assert_same(*results)


@pytest.mark.slow
def test_compiled_networks_change_nothing(tmp_path):
    """With dynamo alone: what inductor makes of the graph differs by rounding, and takes a minute."""
    options = {"ppo_epochs": 2, "mini_batch_size": 4}
    plain = parameters_after_step(learner(tmp_path, **options), *tiny_rollouts())
    compiled = learner(tmp_path, torch_compile=True, torch_compile_backend="eager", **options)
    assert_same(parameters_after_step(compiled, *tiny_rollouts()), plain)
    assert isinstance(compiled.model_wrapped, torch._dynamo.OptimizedModule)
    assert len(compiled.generate(tiny_rollouts()[0], max_new_tokens=2)) == 4
    compiled.save_pretrained(tmp_path / "saved")
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in compiled.model.policy.state_dict().items())


def test_gradient_checkpointing_changes_nothing(tmp_path):
    rollouts = tiny_rollouts()
    expected = parameters_after_step(learner(tmp_path), *rollouts)
    trainer = learner(tmp_path, gradient_checkpointing=True)
    actual = parameters_after_step(trainer, *rollouts)
    assert trainer.model.is_gradient_checkpointing
    assert_same(actual, expected)
    generated = trainer.generate([rollouts[0][0]], return_prompt=False, do_sample=False, max_new_tokens=4)
    assert len(generated[0]) > 0
    assert trainer.model.is_gradient_checkpointing
    with pytest.raises(KeyError):
        trainer.generate([rollouts[0][0]], length_sampler=lambda: {}["length"])
    assert trainer.model.is_gradient_checkpointing
    plain = learner(tmp_path)
    plain.step(*rollouts)
    assert_same(parameters_after_step(trainer, *rollouts), parameters_after_step(plain, *rollouts))


def test_same_seed_same_numbers_and_inputs_untouched(tmp_path):
    results = []
    for _ in range(2):
        trainer = tiny_trainer(tmp_path, batch_size=8, mini_batch_size=2, ppo_epochs=2, seed=3)
        queries, _, scores = tiny_rollouts(8)
        copies = [q.clone() for q in queries], [s.clone() for s in scores]
        for _ in range(2):
            responses = trainer.generate(queries, return_prompt=False, max_new_tokens=6)
            stats = trainer.step(queries, responses, scores)
        assert all(torch.equal(a, b) for a, b in zip(queries + scores, copies[0] + copies[1], strict=True))
        results.append((dict(trainer.model.named_parameters()), stats))
    for name, parameter in results[0][0].items():
        assert torch.equal(parameter, results[1][0][name]), name
    for name, value in results[0][1].items():
        assert name.startswith("time/") or np.array_equal(value, results[1][1][name]), name


def test_ten_steps_raise_the_rewarded_token(tmp_path):
    """Reward 1 for every 'w5': APA makes it frequent, and the KL it reports is that of the new policy."""
    trainer = tiny_trainer(tmp_path, tiny_model(scale=1.0), batch_size=16, mini_batch_size=8, ppo_epochs=2)
    queries = [torch.tensor([2, 3])] * 16
    shares = []
    for _ in range(12):
        responses = trainer.generate(queries, return_prompt=False, batch_size=16, max_new_tokens=8)
        scores = [(r == 5).float().mean() for r in responses]
        shares.append(float(torch.stack(scores).mean()))
        stats = trainer.step(queries, responses, scores)
    assert sum(shares[-3:]) / 3 > 0.3 > 0.15 > shares[0]
    assert stats["objective/kl"] > 1.0


def test_ppo_rewards_carry_the_kl_penalty_and_apa_rewards_do_not(tmp_path):
    queries, responses, scores = tiny_rollouts()
    for loss_type in ("ppo", "apa"):
        trainer = tiny_trainer(tmp_path, loss_type=loss_type, kl_coef=0.5, exact_kl=False)
        trainer.step(queries, responses, scores)
        rollouts, ended_B = trainer._collect(queries, responses, scores, None)
        trainer._evaluate_rollouts(rollouts)
        rewards_BR = rewards_of_tokens(rollouts, ended_B, trainer.args, trainer.run_state)
        mask = rollouts.response_mask_BR
        if loss_type == "apa":
            assert rollouts.old_logprobs_BR is None
            assert float(rewards_BR.sum()) == pytest.approx(float(torch.stack(scores).sum()), abs=1e-5)
        else:
            kl_BR = rollouts.old_logprobs_BR - rollouts.ref_logprobs_BR
            penalty = masked_mean(rewards_BR, mask) - torch.stack(scores).sum() / mask.sum()
            assert float(masked_mean(kl_BR, mask).abs()) > 1e-3
            assert float(penalty) == pytest.approx(-trainer.kl_ctl.value * float(masked_mean(kl_BR, mask)), rel=1e-3)
