"""`OfflineAPATrainer` on data where the optimum is known, and what it promises of splits, resuming, stopping, rows."""

import json
import math
import tempfile

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig, TrainerCallback

from tests._two_processes import run_in_two_processes
from tests.test_two_processes import announce_rank
from tests.tiny import EOS, VOCABULARY, lora_config, tiny_model, tiny_tokenizer
from trl_apa.algorithms.advantages import gae
from trl_apa.algorithms.masking import masked_whiten
from trl_apa.data import Preference
from trl_apa.models import reference_policy
from trl_apa.models.layouts import rows_can_be_selected
from trl_apa.models.logprobs import response_logits, response_logprobs
from trl_apa.offline import OfflineAPATrainer, OfflineConfig, QValueModel, advantage_shifted, label_pairs
from trl_apa.rollout.batch import pad_tokens
from trl_apa.rollout.generation import generate_responses


PROMPT = [5, 6, 7]


def config(folder, **options):
    defaults = {"learning_rate": 1e-2, "max_grad_norm": 0.0, "per_device_train_batch_size": 8, "save_strategy": "no"}
    defaults |= {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1000}
    return OfflineConfig(str(folder), **{**defaults, **options})


def trainer_of(folder, rows, model=None, trainer_kwargs=None, **options):
    model = tiny_model() if model is None else model
    return OfflineAPATrainer(
        config(folder, **options),
        model,
        processing_class=tiny_tokenizer(),
        train_dataset=rows,
        **(trainer_kwargs or {}),
    )


def ragged_rows(count=8, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def ids(low, high):
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(2, VOCABULARY, (length,), generator=generator).tolist()

    rewards = torch.randn(count, generator=generator).tolist()
    rows = [{"input_ids": ids(1, 6), "completion_ids": [*ids(1, 5), EOS], "reward": r} for r in rewards]
    others = [torch.randn(1 + number % 4, generator=generator).tolist() for number in range(count)]
    return [{**row, "ref_rewards": rewards} for row, rewards in zip(rows, others, strict=True)]


def probabilities(trainer, prompt=PROMPT):
    """The policy's next token after the prompt."""
    tokens = pad_tokens([torch.tensor(prompt)], [torch.tensor([0])], pad_token_id=0)
    with torch.no_grad(), trainer.learned_policy() as policy:
        return response_logits(policy, tokens, 1)[0][0, 0].softmax(-1)


# ---- optima that are known ----


@pytest.fixture(scope="module")
def bandit():
    """One state, every token an action, each as often in the data as `counts` says; the reward is the token's own."""
    generator = torch.Generator().manual_seed(3)
    rewards = torch.randn(VOCABULARY, generator=generator)
    counts = 1 + torch.arange(VOCABULARY) % 2
    rows = [
        {"input_ids": PROMPT, "completion_ids": [token], "reward": rewards[token].item()}
        for token in range(VOCABULARY)
        for _ in range(int(counts[token]))
    ]
    return rows, rewards, counts / counts.sum()


def learn(folder, bandit, **options):
    rows = bandit[0]
    options = {"per_device_train_batch_size": len(rows), "per_device_eval_batch_size": len(rows), **options}
    trainer = trainer_of(folder, rows, lr_scheduler_type="linear", **options)
    initial = probabilities(trainer) if options["loss_type"] != "ilql" else None
    trainer.train()
    return trainer, initial


def advantage_of_each_token(trainer):
    actions = torch.cat(trainer.rollouts.responses)
    return torch.zeros(VOCABULARY).index_put((actions,), trainer.rollouts.advantages_BR[:, 0])


def test_awr_ends_at_the_data_s_policy_weighted_by_the_advantages(tmp_path, bandit):
    trainer, _ = learn(tmp_path, bandit, loss_type="awr", kl_coef=0.5, num_train_epochs=90, value_epochs=60)
    rows, rewards, share = bandit
    # V of the one state is the mean reward of the data, and the advantages are whitened
    assert trainer.rollouts.values_BR[:, 0].mean().item() == pytest.approx((share * rewards).sum().item(), abs=0.02)
    taken = torch.tensor([row["reward"] for row in rows])
    expected = (rewards - taken.mean()) / taken.std()
    torch.testing.assert_close(advantage_of_each_token(trainer), expected, rtol=0, atol=0.02)
    optimum = share * (advantage_of_each_token(trainer) / 0.5).exp()
    torch.testing.assert_close(probabilities(trainer), optimum / optimum.sum(), rtol=0, atol=5e-3)


def test_apa_with_a_learned_normaliser_ends_at_the_optimum_of_the_objective(tmp_path, bandit):
    options = {"loss_type": "apa", "kl_coef": 1.0, "num_train_epochs": 90, "value_epochs": 0}
    trainer, initial = learn(tmp_path, bandit, **options, learn_state_normaliser=True)
    excess = advantage_of_each_token(trainer).exp()
    normalizer = (initial * excess).sum()
    torch.testing.assert_close(probabilities(trainer), initial * excess / normalizer, rtol=0, atol=5e-3)
    tokens = pad_tokens([torch.tensor(PROMPT)], [torch.tensor([0])], pad_token_id=0)
    with torch.no_grad():
        h = trainer.networks.normaliser(tokens, 1).item()
    assert h == pytest.approx(normalizer.log().item(), abs=0.05)


def test_dro_ends_at_the_optimum_of_the_objective_and_its_value(tmp_path, bandit):
    options = {"loss_type": "dro", "kl_coef": 1.0, "num_train_epochs": 90}
    trainer, initial = learn(tmp_path, bandit, **options)
    excess = bandit[1].exp()
    normalizer = (initial * excess).sum()
    torch.testing.assert_close(probabilities(trainer), initial * excess / normalizer, rtol=0, atol=5e-3)
    trainer.estimate_advantages()
    assert trainer.rollouts.values_BR[:, 0].mean().item() == pytest.approx(normalizer.log().item(), abs=0.02)


def test_ilql_learns_q_and_v_and_decodes_with_their_difference(tmp_path, bandit):
    trainer, _ = learn(
        tmp_path,
        bandit,
        loss_type="ilql",
        num_train_epochs=150,
        cql_coef=0.0,
        expectile=0.5,
        polyak=0.5,
        ilql_beta=2.0,
    )
    _, rewards, share = bandit
    tokens = pad_tokens([torch.tensor(PROMPT)], [torch.tensor([0])], pad_token_id=0)
    with torch.no_grad():
        values = trainer.networks.value_model.at_responses(tokens, 1)
    torch.testing.assert_close(values["target_q"][0, 0], rewards, rtol=0, atol=0.05)
    assert values["values"].item() == pytest.approx((share * rewards).sum().item(), abs=0.05)
    # pi_beta imitates the data, and decoding moves it by beta (Q - V)
    expected = share * (2.0 * rewards).exp()
    torch.testing.assert_close(probabilities(trainer), expected / expected.sum(), rtol=0, atol=0.02)


# ---- the update ----


def parameters_after_one_step(folder, rows, size, accumulation, **options):
    split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 1}
    trainer = trainer_of(folder, rows, value_epochs=0, optim="sgd", **split, **options)
    trainer.train()
    return {name: p.detach().clone() for name, p in trainer.networks.named_parameters()}


LOSSES = [{"loss_type": "awr", "freeze_value": False}, {"loss_type": "apa", "learn_state_normaliser": True}]
LOSSES += [{"loss_type": "ilql"}, {"loss_type": "qrpo"}, {"loss_type": "dro", "vf_coef": 0.5}]


@pytest.mark.parametrize("options", LOSSES, ids=lambda options: options["loss_type"])
def test_the_split_into_micro_batches_does_not_matter(tmp_path, options):
    rows = ragged_rows()
    whole = parameters_after_one_step(tmp_path / "a", rows, 8, 1, **options)
    split = parameters_after_one_step(tmp_path / "b", rows, 2, 4, **options)
    initial = trainer_of(tmp_path / "c", rows, **options).networks.state_dict()
    moved = 0
    for name, parameter in whole.items():
        torch.testing.assert_close(split[name], parameter, rtol=0, atol=1e-6, msg=name)
        moved += not torch.equal(parameter, initial[name])
    assert moved > 10


def evaluated_on_two_ranks(rank, folder):
    """What each rank says of a reward function that ends the second one in an evaluation; then a reward of both."""

    def judge(completions, **_):
        if rank == 1 and faulty:
            raise SystemExit(3)
        return [float(rank)] * len(completions)

    given = {"eval_dataset": [{"prompt": f"w{number}"} for number in (5, 6, 7)], "reward_funcs": judge}
    options = {"per_device_eval_batch_size": 1, "max_completion_length": 2}
    trainer, faulty = trainer_of(folder, ragged_rows(), trainer_kwargs=given, **options), True
    with pytest.raises((RuntimeError, ValueError)) as failed:
        trainer.evaluate()
    faulty = False
    return f"{type(failed.value).__name__}: {failed.value}", trainer.evaluate()["eval_reward"]


def on_two_ranks(rank, options):
    announce_rank(rank)
    with tempfile.TemporaryDirectory() as folder:
        after = [parameters_after_one_step(folder, ragged_rows(), 4, 1, **each) for each in options]
        return [{name: p.numpy() for name, p in one.items()} for one in after], evaluated_on_two_ranks(rank, folder)


ONE_STEP = [{"loss_type": "awr", "freeze_value": False}, {"loss_type": "qrpo"}, {"loss_type": "dro"}]


@pytest.fixture(scope="module")
def ranks():
    return run_in_two_processes(on_two_ranks, ONE_STEP)


def test_two_ranks_equal_one_process_on_all_rows(tmp_path, ranks):
    for number, options in enumerate(ONE_STEP):
        single = parameters_after_one_step(tmp_path, ragged_rows(), 8, 1, **options)
        for steps, _ in ranks:
            for name, expected in single.items():
                found = torch.from_numpy(steps[number][name])
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-5, msg=name)


def test_an_evaluation_that_fails_on_one_rank_fails_on_both_and_the_next_one_works(ranks):
    first, second = (outcome for _, outcome in ranks)
    failure = "RuntimeError: reward function judge failed: SystemExit: 3"
    # Of three prompts the first rank has two.
    assert second == (failure, pytest.approx(1 / 3))
    assert first == (
        f"ValueError: 1 other process(es) failed at the same point: process 1: {failure}",
        pytest.approx(1 / 3),
    )


def test_what_was_learned_before_an_evaluation_failed_is_kept(tmp_path):
    """The held-out reward is asked for after each of four epochs of two steps."""
    calls = []

    def judge(completions, **_):
        calls.append(len(completions))
        if len(calls) == 2:
            raise SystemExit(3)
        return [1.0] * len(completions)

    given = {"eval_dataset": [{"prompt": "w5 w6"}], "reward_funcs": judge}
    options = {"eval_strategy": "epoch", "num_train_epochs": 4, "value_epochs": 0, "per_device_train_batch_size": 4}

    def trainer(folder):
        return trainer_of(folder, ragged_rows(), trainer_kwargs=given, max_completion_length=2, **options)

    with pytest.raises(RuntimeError, match="reward function judge failed: SystemExit: 3"):
        trainer(tmp_path).train()
    resumed, whole = trainer(tmp_path), trainer(tmp_path / "whole")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    whole.train()
    assert resumed.state.global_step == whole.state.global_step == 8
    for one, other in zip(resumed.networks.parameters(), whole.networks.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_lines_of_the_value_model_say_what_they_are_of(tmp_path, capsys):
    """Eight rows in batches of four, twice; the policy's lines follow."""
    options = {"value_epochs": 2, "logging_steps": 1, "disable_tqdm": False, "max_steps": 1}
    trainer_of(tmp_path, ragged_rows(), per_device_train_batch_size=4, **options).train()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    of_values = [line.partition("  loss ")[0].strip() for line in lines if "value model" in line]
    assert of_values == [f"value model, step {step}/4" for step in (1, 2, 3, 4)]
    assert "value model" not in lines[4] and "loss" in lines[4]


class SpoilOptimizer(TrainerCallback):
    """Before the checkpoint of a step is written, one number of the optimizer's state becomes NaN."""

    def on_step_end(self, args, state, control, optimizer, **kwargs):
        next(iter(optimizer.state.values()))["exp_avg"].flatten()[0] = math.nan


def test_a_checkpoint_whose_optimizer_is_not_finite_is_refused(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "value_epochs": 0}
    trainer_of(tmp_path, ragged_rows(), trainer_kwargs={"callbacks": [SpoilOptimizer()]}, **options).train()
    with pytest.raises(
        ValueError, match=r"the optimizer of .*checkpoint-1 is not finite: exp_avg of a parameter of shape"
    ):
        trainer_of(tmp_path, ragged_rows(), **{**options, "max_steps": 2}).train(resume_from_checkpoint=True)


def test_the_loss_is_the_plain_formula(tmp_path):
    rows = ragged_rows()
    trainer = trainer_of(tmp_path, rows, loss_type="apa", kl_coef=0.4, value_epochs=0, max_steps=1, logging_steps=1)
    trainer.train()
    # Without a fitted V, the advantage of every token is lambda_GAE ^ (tokens to come) times the reward, whitened.
    plain = [
        0.95 ** (len(row["completion_ids"]) - 1 - t) * row["reward"]
        for row in rows
        for t in range(len(row["completion_ids"]))
    ]
    whitened = (torch.tensor(plain) - torch.tensor(plain).mean()) / torch.tensor(plain).std()
    assert trainer.state.log_history[0]["loss"] == pytest.approx((whitened / 0.4).square().mean().item(), rel=1e-4)
    # at the first step pi is pi_init
    assert trainer.state.log_history[0]["policy/log_ratio"] == pytest.approx(0.0, abs=1e-5)


def test_qrpo_is_the_plain_formula_and_has_no_value_model(tmp_path):
    rows = ragged_rows()
    trainer = trainer_of(tmp_path, rows, loss_type="qrpo", kl_coef=0.4, num_train_epochs=30, logging_steps=1)
    assert trainer.networks.value_model is None
    trainer.train()
    shares = [sum(r <= row["reward"] for r in row["ref_rewards"]) / len(row["ref_rewards"]) for row in rows]
    targets = [share - 0.4 * math.log(0.4 * (math.exp(2.5) - 1)) for share in shares]
    # at the first step pi is pi_init
    first, last = trainer.state.log_history[0], trainer.state.log_history[-2]
    assert first["loss"] == pytest.approx(sum(target**2 for target in targets) / len(targets), rel=1e-4)
    assert first["policy/log_ratio"] == pytest.approx(0.0, abs=1e-5)
    assert last["loss"] < 0.05 * first["loss"]
    trainer.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "value_model").exists()
    with pytest.warns(UserWarning, match="value_model='separate' has no effect with loss_type='qrpo'"):
        trainer_of(tmp_path, rows, trainer_kwargs={"value_model": "separate"}, loss_type="qrpo")
    with pytest.raises(ValueError, match=r"ref_rewards is None; it should be a list of numbers .row 2."):
        trainer_of(tmp_path, [rows[0], {**rows[1], "ref_rewards": None}], loss_type="qrpo")


def test_the_value_model_is_fitted_to_the_returns_and_then_frozen(tmp_path):
    rows = ragged_rows()
    trainer = trainer_of(tmp_path, rows, value_epochs=40, num_train_epochs=1, gamma=0.9)
    trainer.train()
    rollouts, mask = trainer.rollouts, trainer.rollouts.response_mask_BR
    for row, returns, counted in zip(rows, rollouts.returns_BR, mask, strict=True):
        length = len(row["completion_ids"])
        expected = [row["reward"] * 0.9 ** (length - 1 - t) for t in range(length)]
        assert returns[counted].tolist() == pytest.approx(expected, rel=1e-5)
    error = (rollouts.values_BR - rollouts.returns_BR)[mask].square().mean()
    assert error < 0.2 * rollouts.returns_BR[mask].square().mean()
    advantages, _ = gae(rollouts.rewards_BR, rollouts.values_BR, mask, 0.9, 0.95)
    torch.testing.assert_close(rollouts.advantages_BR, masked_whiten(advantages, mask))
    assert not any(p.requires_grad for p in trainer.networks.value_model.parameters())
    before = rollouts.values_BR.clone()
    trainer.estimate_advantages()
    torch.testing.assert_close(rollouts.values_BR, before, rtol=0, atol=1e-6)


def test_a_value_model_that_goes_on_learning_gives_new_advantages_in_every_epoch(tmp_path):
    trainer = trainer_of(tmp_path, ragged_rows(), value_epochs=0, num_train_epochs=2, freeze_value=False)
    seen = []
    estimate = trainer.estimate_advantages
    trainer.estimate_advantages = lambda: (estimate(), seen.append(trainer.rollouts.advantages_BR.clone()))
    trainer.train()
    assert len(seen) == 3 and torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


@pytest.mark.parametrize("step", [1, 2, 3])  # within an epoch, between two, and within the second
@pytest.mark.parametrize("options", LOSSES, ids=lambda options: options["loss_type"])
def test_a_run_goes_on_from_its_checkpoint_as_if_it_had_not_stopped(tmp_path, options, step):
    options = {**options, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 4}
    options |= {"value_epochs": 2, "num_train_epochs": 2, "logging_steps": 2}
    whole = trainer_of(tmp_path / "whole", ragged_rows(), **options)
    whole.train()
    resumed = trainer_of(tmp_path / "resumed", ragged_rows(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    for (name, expected), parameter in zip(
        whole.networks.named_parameters(), resumed.networks.parameters(), strict=True
    ):
        torch.testing.assert_close(parameter, expected, rtol=0, atol=1e-6, msg=name)
    losses = [[row["loss/total"] for row in t.state.log_history if "loss" in row] for t in (whole, resumed)]
    assert len(losses[0]) == 2 and losses[1] == pytest.approx(losses[0])
    with pytest.raises(ValueError, match="has no complete checkpoint"):
        trainer_of(tmp_path / "empty", ragged_rows(), **options).train(resume_from_checkpoint=True)


def test_what_is_saved_comes_back(tmp_path):
    trainer = trainer_of(tmp_path, ragged_rows(), loss_type="ilql", max_steps=1)
    trainer.train()
    trainer.save_pretrained(tmp_path / "saved")
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    loaded = QValueModel.from_pretrained(tmp_path / "saved" / "value_model")
    for network, expected in ((policy, trainer.networks.policy), (loaded, trainer.networks.value_model)):
        state = expected.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    again = trainer_of(tmp_path, ragged_rows(), loss_type="ilql", trainer_kwargs={"value_model": loaded})
    assert again.networks.value_model is loaded


# ---- decoding ----


def shifted_by_hand(policy, q_model, beta, query, length):
    """The greedy response, one token at a time, without cache or padding."""
    ids = list(query)
    with torch.no_grad():
        for _ in range(length):
            tokens = pad_tokens([torch.tensor(ids)], [torch.tensor([0])], pad_token_id=0)
            values = q_model.at_responses(tokens, 1)
            advantages = values["target_q"][0, 0] - values["values"][0, 0]
            logits = response_logits(policy, tokens, 1)[0][0, 0].log_softmax(-1) + beta * advantages
            ids.append(int(logits.argmax()))
    return ids[len(query) :], logits.log_softmax(-1)


@pytest.mark.parametrize("family", ["llama", "gpt2", "lora"])
def test_sampling_and_log_probs_see_the_shifted_policy_whatever_the_padding(tmp_path, family):
    model = tiny_model("llama" if family == "lora" else family)
    if family == "lora":
        model = get_peft_model(model, lora_config(init_lora_weights=False))
    trainer = trainer_of(tmp_path, ragged_rows(), model, loss_type="ilql")
    policy, q_model = trainer.networks.policy.eval(), trainer.networks.value_model
    for parameter in q_model.parameters():  # heads that say something
        torch.nn.init.normal_(parameter, std=0.4, generator=torch.Generator().manual_seed(parameter.numel()))
    queries = [torch.tensor([3, 4, 5, 6, 9]), torch.tensor([7])]
    with advantage_shifted(policy, q_model, beta=2.0):
        inputs = {"input_ids": torch.tensor([[3, 4, 5, 6, 9], [0, 0, 0, 0, 7]]), "do_sample": False}
        inputs["attention_mask"] = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 1]])
        generated = policy.generate(**inputs, max_new_tokens=6, eos_token_id=None, pad_token_id=0)[:, 5:]
        tokens = pad_tokens(queries, list(generated), pad_token_id=0)
        logprobs, _ = response_logprobs(policy, tokens, 6)
    unshifted, _ = response_logprobs(policy, tokens, 6)
    for row, query in enumerate(queries):
        expected, last = shifted_by_hand(policy, q_model, 2.0, query.tolist(), 6)
        assert generated[row].tolist() == expected
        assert logprobs[row, -1].item() == pytest.approx(last[expected[-1]].item(), abs=1e-4)
    assert (logprobs - unshifted).abs().max() > 0.1


def shifted_logprob(policy, q_model, beta, temperature, query, response):
    """log pi of a response under the shifted policy: the row alone, one full forward pass of each network a token."""
    total, ids = 0.0, list(query)
    with torch.no_grad():
        for token in response:
            logits = policy(input_ids=torch.tensor([ids])).logits[0, -1]
            hidden = q_model.trunk(input_ids=torch.tensor([ids])).last_hidden_state[:, -1:]
            logits = logits + beta * q_model.advantages(hidden)[0, 0]
            total += (logits / temperature).log_softmax(-1)[token].item()
            ids.append(token)
    return total


def speak_up(q_model, seed=0):
    """Heads and trunk that say something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in q_model.parameters():
            parameter.normal_(std=0.4, generator=generator)


@pytest.mark.parametrize(
    ("family", "evaluated_first"), [("llama", False), ("llama", True), ("gpt2", True), ("lora", False)]
)
def test_the_held_out_kl_of_ilql_is_that_of_the_policy_that_sampled(tmp_path, family, evaluated_first):
    """Before and after training, whatever was measured before; pi_init is not shifted."""
    model = tiny_model("llama" if family == "lora" else family)
    if family == "lora":
        model = get_peft_model(model, lora_config(init_lora_weights=False))
    sampled = []

    def reward(completion_ids, **columns):
        sampled.extend(completion_ids)
        return [0.0] * len(completion_ids)

    prompts = [[3, 4, 5, 6, 9], [7], [8, 2]]
    given = {"eval_dataset": [{"input_ids": ids} for ids in prompts], "reward_funcs": reward}
    options = {"max_steps": 1, "max_completion_length": 6, "ilql_beta": 1.5, "temperature": 0.8, "optim": "sgd"}
    trainer = trainer_of(tmp_path, ragged_rows(), model, given, loss_type="ilql", **options)
    if evaluated_first:  # the heads start at zero: nothing is shifted yet
        assert trainer.evaluate()["eval_kl"] == pytest.approx(0.0, abs=1e-5)
    trainer.train()
    policy, q_model = trainer.networks.policy, trainer.networks.value_model
    for seed in (1, 2):
        speak_up(q_model, seed)
        sampled.clear()
        measured = trainer.evaluate()["eval_kl"]
        kl = 0.0
        with reference_policy(policy, trainer.ref_model) as reference:
            for query, ids in zip(prompts, sampled, strict=True):
                kl -= shifted_logprob(reference, q_model, 0.0, 0.8, query, ids) / 3
        for query, ids in zip(prompts, sampled, strict=True):
            kl += shifted_logprob(policy, q_model, 1.5, 0.8, query, ids) / 3
        assert measured == pytest.approx(kl, abs=2e-4) and abs(kl) > 0.5


def test_the_shift_is_made_in_float32(tmp_path):
    """In bfloat16 a logit of 20 would be off by up to 0.06 nats."""
    trainer = trainer_of(tmp_path, ragged_rows(), tiny_model(dtype=torch.bfloat16, scale=6.0), loss_type="ilql")
    policy, q_model = trainer.networks.policy, trainer.networks.value_model
    speak_up(q_model)
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        plain = policy(input_ids=ids).logits
        hidden = q_model.trunk(input_ids=ids).last_hidden_state
        with advantage_shifted(policy, q_model, beta=2.0):
            shifted = policy(input_ids=ids).logits
    assert plain.dtype == torch.bfloat16
    torch.testing.assert_close(shifted, plain.float() + 2.0 * q_model.advantages(hidden), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 2.0])
def test_a_model_that_keeps_its_rows_beside_the_cache_samples_them_all_to_the_end(tmp_path, beta):
    """ILQL's values have a cache of their own, of which no row is left out, even where they move no logit."""
    trainer = trainer_of(tmp_path, ragged_rows(), loss_type="ilql")
    policy, q_model = trainer.networks.policy.eval(), trainer.networks.value_model
    queries = [torch.tensor([3, 4 + row]) for row in range(12)]
    sampling = GenerationConfig(do_sample=True, max_new_tokens=12, eos_token_id=list(range(2, 12)), pad_token_id=0)
    with advantage_shifted(policy, q_model, beta=beta):
        assert not rows_can_be_selected(policy, 14)
        for size in (12, 5):
            responses = generate_responses(policy, queries, sampling, tiny_tokenizer(), batch_size=size)
            assert len({len(response) for response in responses}) > 2


# ---- held-out rewards ----


def test_training_stops_when_the_held_out_reward_no_longer_rises_and_the_best_policy_comes_back(tmp_path):
    rewards = iter([1.0, 3.0, 2.0, 2.5, 9.0])
    current = []

    def reward(completions, **columns):
        current.append(next(rewards))
        return [current[-1]] * len(completions)

    given = {"eval_dataset": [{"prompt": "w5 w6"}], "reward_funcs": reward}
    options = {"eval_strategy": "epoch", "early_stopping_patience": 2, "num_train_epochs": 9, "value_epochs": 0}
    trainer = trainer_of(tmp_path, ragged_rows(), trainer_kwargs=given, max_completion_length=4, **options)
    trainer.train()
    evaluated = [row["eval_reward"] for row in trainer.state.log_history if "eval_reward" in row]
    assert evaluated == [1.0, 3.0, 2.0, 2.5]
    best = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2").state_dict()
    assert all(torch.equal(p, best[name]) for name, p in trainer.networks.policy.state_dict().items())


def test_the_held_out_numbers_are_those_of_the_samples(tmp_path):
    seen = []

    def reward(prompts, completions, completion_ids, target, **columns):
        seen.append((prompts, completions, completion_ids))
        return [float(value) for value in target]

    prompts = [{"prompt": f"w{number} w9", "target": number} for number in range(3, 6)]
    given = {"eval_dataset": prompts, "reward_funcs": reward}
    trainer = trainer_of(
        tmp_path, ragged_rows(), trainer_kwargs=given, max_completion_length=4, per_device_eval_batch_size=2
    )
    metrics = trainer.evaluate()
    assert metrics["eval_reward"] == 4.0 and metrics["eval_reward_std"] == pytest.approx(math.sqrt(2 / 3))
    assert metrics["eval_kl"] == pytest.approx(0.0, abs=1e-5)
    ids = [ids for _, _, batch in seen for ids in batch]
    assert [prompt for batch, _, _ in seen for prompt in batch] == ["w3 w9", "w4 w9", "w5 w9"]
    assert metrics["eval_response_length"] == pytest.approx(sum(map(len, ids)) / 3)
    assert metrics["eval_eos_share"] == sum(row[-1] == EOS for row in ids) / 3
    # the same luck every time
    trainer.evaluate()
    assert [ids for _, _, batch in seen[2:] for ids in batch] == ids
    parts = trainer.evaluate({"odd": prompts[::2], "even": prompts[1:2]})
    assert (parts["eval_odd_reward"], parts["eval_even_reward"]) == (4.0, 4.0)
    with pytest.raises(ValueError, match="needs eval_dataset"):
        trainer_of(tmp_path, ragged_rows()).evaluate()


@pytest.mark.parametrize("loss_type", ["awr", "ilql"])
def test_gradient_checkpointing_changes_neither_the_update_nor_the_samples(tmp_path, loss_type):
    runs = {}
    for checkpointing in (False, True):
        sampled = []

        def reward(completion_ids, sampled=sampled, **columns):
            sampled.extend(completion_ids)
            return [0.0] * len(completion_ids)

        given = {"eval_dataset": [{"prompt": "w5 w6 w7"}, {"prompt": "w8"}], "reward_funcs": reward}
        options = {"gradient_checkpointing": checkpointing, "max_completion_length": 8, "value_epochs": 1}
        trainer = trainer_of(
            tmp_path, ragged_rows(), trainer_kwargs=given, loss_type=loss_type, max_steps=2, **options
        )
        trainer.train()
        trainer.evaluate()
        assert trainer.networks.is_gradient_checkpointing == checkpointing
        runs[checkpointing] = (sampled, list(trainer.networks.parameters()))
    assert runs[True][0] == runs[False][0] and max(map(len, runs[True][0])) > 3
    for with_it, without in zip(runs[True][1], runs[False][1], strict=True):
        torch.testing.assert_close(with_it, without, rtol=0, atol=1e-6)


# ---- rows and options ----


def test_both_responses_of_a_pair_are_labelled_once():
    pairs = [Preference("w3", " w5 w5", " w6", 1), Preference("w3", " w6", " w7", 2)]

    def reward(prompts, completions, completion_ids, **columns):
        assert all(ids[-1] == EOS for ids in completion_ids)
        return [float(len(text.split())) for text in completions]

    rows = label_pairs(pairs, reward, tiny_tokenizer(), batch_size=2)
    assert rows == [
        {"prompt": "w3", "completion": text, "reward": value}
        for text, value in ((" w5 w5", 2), (" w6", 1), (" w7", 1))
    ]
    with pytest.raises(ValueError, match="reward_funcs has 'adapter'"):
        label_pairs(pairs, "adapter:some/path", tiny_tokenizer())


def test_texts_end_with_eos_and_long_rows_are_cut(tmp_path):
    rows = [
        {"prompt": "w3 w4 w5", "completion": "w6 w7", "reward": 1},
        {"query": "w3", "completion": [{"role": "assistant", "content": "w6 w7 w8 w9"}], "reward": 2.0},
        {"input_ids": [4], "completion_ids": [7, 8], "reward": 0},
    ]
    rollouts = trainer_of(tmp_path, rows, max_prompt_length=2, max_completion_length=4).rollouts
    assert [query.tolist() for query in rollouts.queries] == [[4, 5], [3], [4]]
    assert [response.tolist() for response in rollouts.responses] == [[6, 7, EOS], [6, 7, 8, 9], [7, 8]]
    assert rollouts.rewards_BR.tolist() == [[0, 0, 1, 0], [0, 0, 0, 2], [0, 0, 0, 0]]
    assert len(trainer_of(tmp_path, rows, add_eos=False).rollouts.responses[0]) == 2


def test_rows_that_cannot_be_learned_from_are_all_named(tmp_path):
    good = {"prompt": "w3", "completion": "w4", "reward": 1.0}
    bad = [
        {**good, "reward": math.nan},
        {**good, "reward": "1"},
        {**good, "reward": 1e39},
        {**good, "reward": 10**400},
        {**good, "reward": -2e18},
        {**good, "completion": None},
        {**good, "completion": "", "completion_ids": []},
        {**good, "completion_ids": [VOCABULARY]},
        {**good, "completion_ids": [2] * 64},
        {"completion": "w4", "reward": 1.0},
    ]
    with pytest.raises(ValueError, match="1 rows to learn from, 10 bad rows") as raised:
        trainer_of(tmp_path, [good, *bad])
    said = str(raised.value)
    assert "reward is nan, it should be a finite number (row 2)" in said and "reward is '1'" in said
    assert "it should have completion" in said and "the response has no token (row 8)" in said
    assert "holds token ids from 32 to 32" in said and "the model has 64 positions" in said and "(row 11)" in said
    assert "reward is 1e+39, it should be a finite number" in said and "reward is 1000" in said
    assert "reward is -2e+18, it should be at most 1e+18 in size (row 6)" in said
    with pytest.raises(ValueError, match="train_dataset: 0 rows"):
        trainer_of(tmp_path, [])


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"loss_type": "ppo"}, "loss_type='ppo': it should be one of apa, awr, ilql, qrpo, dro"),
        ({"loss_type": "ilql", "kl_coef": 0.1}, "kl_coef=0.1: ILQL has none"),
        ({"loss_type": "awr", "learn_state_normaliser": True}, "only APA omits log Z"),
        ({"kl_coef": 0.0}, "kl_coef=0.0: it should be greater than 0"),
        ({"gae_lambda": 1.5}, "gae_lambda=1.5: it should be between 0 and 1"),
        ({"expectile": 1.0}, "expectile=1.0"),
        ({"polyak": 0.0}, "polyak=0.0"),
        ({"value_epochs": -1}, "value_epochs=-1: it should not be negative"),
        ({"bc_coef": math.inf}, "bc_coef=inf: it should be a finite number"),
        ({"learning_rate": math.nan}, "learning_rate=nan: it should be a finite number"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1: it should not be negative"),
        ({"reward_weights": [math.nan]}, r"reward_weights\[0\] is nan; it should be a finite number"),
        ({"early_stopping_patience": 2}, "needs eval_strategy"),
        ({"early_stopping_patience": 0, "eval_strategy": "epoch"}, "early_stopping_patience=0"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, options, problem):
    with pytest.raises(ValueError, match=problem):
        config(tmp_path, **options)


def test_arguments_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match="train_dataset is None"):
        OfflineAPATrainer(config(tmp_path), tiny_model(), processing_class=tiny_tokenizer())
    with pytest.raises(ValueError, match="args is a dict; it should be a OfflineConfig"):
        OfflineAPATrainer({}, tiny_model(), processing_class=tiny_tokenizer(), train_dataset=ragged_rows())
    with pytest.raises(ValueError, match="value_model is a PolicyValueHead"):
        trainer_of(tmp_path, ragged_rows(), trainer_kwargs={"value_model": "head"})
    with pytest.raises(ValueError, match="model is an encoder-decoder"):
        trainer_of(tmp_path, ragged_rows(), tiny_model("t5"))
    with pytest.raises(ValueError, match="early_stopping_patience needs eval_dataset"):
        trainer_of(tmp_path, ragged_rows(), early_stopping_patience=1, eval_strategy="epoch")


def test_the_defaults_are_those_that_worked_offline(tmp_path):
    assert config(tmp_path).loss_type == "awr" and config(tmp_path).kl_coef == 0.25
    apa = config(tmp_path, loss_type="apa")
    assert apa.kl_coef == 0.3 and apa.freeze_value and apa.value_epochs > 0 and not apa.learn_state_normaliser
    assert [config(tmp_path, loss_type=name).kl_coef for name in ("qrpo", "dro", "ilql")] == [0.1, 0.3, None]
    assert json.loads(apa.to_json_string())["loss_type"] == "apa"
