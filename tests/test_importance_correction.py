"""Weights of tokens that another policy has sampled: against TRL's, by hand, and in the update."""

import inspect
import math
import textwrap
import warnings
from types import SimpleNamespace

import pytest
import torch
import trl
from trl import GRPOTrainer

from tests.test_training import StopAt, parameters, trainer_for
from tests.test_update import assert_same, row_logprobs
from tests.tiny import tiny_config, tiny_model, tiny_pairs, tiny_tokenizer, tiny_trainer
from trl_apa import APATrainer
from trl_apa.algorithms import Algorithm
from trl_apa.algorithms.importance import importance_weights
from trl_apa.algorithms.masking import masked_mean
from trl_apa.rollout.sampling import SampledTokens
from trl_apa.trainer import experience


CORRECTED = {"importance_correction": "truncate", "importance_max": 1.2, "importance_min": 0.9}
QUERIES, RESPONSES, SCORES = tiny_pairs(8)
# How far the engine's log-probs are from the policy's, nats: the same for each token of a row.
SHIFTS = [0.0, 0.05, -0.05, 0.5, -0.5, 0.1, -0.1, 0.02]


def by_trl(logprobs, sampling_logprobs, mask, mode, highest, lowest):
    """What the lines of TRL's trainer that make the ratio make of the same tensors."""
    lines = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    part = lines.index("# Compute the importance sampling ratio when using vLLM")
    start = lines.index("mask = completion_mask if tool_mask is None", part)
    end = lines.index("# Compute the per-token log probabilities for the reference model")
    code = textwrap.dedent(" " * 16 + lines[start:end])
    options = {"mode": mode, "clip_max": highest, "clip_min": lowest}
    given = {
        "self": SimpleNamespace(**{f"vllm_importance_sampling_{name}": value for name, value in options.items()}),
        **{"torch": torch, "math": math, "completion_mask": mask.int(), "tool_mask": None},
        **{"old_per_token_logps": logprobs, "sampling_per_token_logps": sampling_logprobs},
    }
    exec(code, given)
    return given["vllm_importance_sampling_ratio"].expand_as(logprobs)


@pytest.mark.skipif(not trl.__version__.startswith("1.16."), reason="reads the source of TRL 1.16")
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("correction", ["truncate", "mask"])
@pytest.mark.parametrize("bounds", [(3.0, None), (1.1, 0.7), (None, 0.8)])
def test_the_weights_are_trls(level, correction, bounds):
    """Where a token counts, and with tokens of which the sampler does not know it."""
    torch.manual_seed(0)
    logprobs = -torch.rand(16, 9) * 3
    sampling = logprobs + torch.randn(16, 9) * 0.3
    sampling[2, 1] = sampling[5, 0] = torch.nan
    mask = torch.arange(9)[None] < torch.randint(1, 10, (16, 1))
    mask[3, 0] = False
    weights = importance_weights(logprobs, sampling, mask, correction, level, *bounds)
    expected = by_trl(logprobs, sampling, mask, f"{level}_{correction}", *bounds)
    torch.testing.assert_close(weights[mask], expected[mask])
    assert weights[mask].unique().numel() > 3


def test_weights_worked_by_hand():
    """Ratios 2, 1/2 and 4, of which the last token does not count; of the sequence 1."""
    log = math.log(2.0)
    logprobs = torch.tensor([[-1.0, -2.0, -1.0]])
    sampling = logprobs - torch.tensor([[log, -log, 2 * log]])
    mask = torch.tensor([[True, True, False]])

    def weights(*options):
        return importance_weights(logprobs, sampling, mask, *options)[0].tolist()

    assert weights("truncate", "token", 1.5) == pytest.approx([1.5, 0.5, 1.0])
    assert weights("truncate", "token", 1.5, 0.8) == pytest.approx([1.5, 0.8, 1.0])
    assert weights("mask", "token", 1.5) == pytest.approx([0.0, 0.5, 1.0])
    assert weights("mask", "token", None, 0.8) == pytest.approx([2.0, 0.0, 1.0])
    assert weights("truncate", "token", None) == pytest.approx([2.0, 0.5, 1.0])
    assert weights("mask", "sequence", 1.5) == pytest.approx([1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="correction is 'clip', it should be one of truncate, mask"):
        weights("clip")
    with pytest.raises(ValueError, match="level is 'row', it should be one of token, sequence"):
        weights("mask", "row")


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("correction", ["truncate", "mask"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("apart", [0.2, 2.0, 89.0, 1e4, math.inf])
def test_no_ratio_is_infinite_however_far_the_sampler_is(level, correction, dtype, apart):
    """Of 512 tokens each way; an advantage of 0 times a weight is 0."""
    logprobs = torch.full((2, 512), -1.0, dtype=dtype)
    sampling = logprobs - torch.tensor([[apart], [-apart]], dtype=dtype)
    mask = torch.ones(2, 512).bool()
    unbounded = importance_weights(logprobs, sampling, mask, correction, level, None)
    assert unbounded.float().isfinite().all() and (unbounded[0] > 1).all() and (unbounded[1] < 1).all()
    assert (unbounded.float() * 0.0 == 0).all()
    bounded = importance_weights(logprobs, sampling, mask, correction, level, 1.1)
    assert bounded[0].unique().tolist() == pytest.approx([0.0 if correction == "mask" else 1.1])


class Reporting:
    """Answers with fixed responses, and with log-probs that are `SHIFTS` away from those of a copy of the policy."""

    def __init__(self, changed=lambda row, logprobs: logprobs, reports=True):
        self.changed, self.reports = changed, reports

    def sample(self, policy, prompts, request):
        ids = [response.tolist() for response in RESPONSES]
        if not self.reports:
            return ids
        with torch.no_grad():
            pairs = zip(QUERIES, RESPONSES, strict=True)
            logprobs = [row_logprobs(policy, *pair, request.generation_config.temperature or 1.0) for pair in pairs]
        shifted = [(row + shift).clamp(max=0.0).tolist() for row, shift in zip(logprobs, SHIFTS, strict=True)]
        return SampledTokens(ids, [self.changed(number, row) for number, row in enumerate(shifted)])


def trainer_with(tmp_path, sampler, **config):
    options = {"batch_size": 8, "mini_batch_size": 4, "optim": "sgd", "learning_rate": 0.1, "ppo_epochs": 2, **config}
    options = {"advantage_estimator": "batch", "max_completion_length": 8, **options}
    config = tiny_config(tmp_path, **options)
    return APATrainer(config, tiny_model(), tokenizer=tiny_tokenizer(), sampler=sampler)


def step_of(trainer):
    responses = trainer.generate(QUERIES, return_prompt=False)
    assert [r.tolist() for r in responses] == [r.tolist() for r in RESPONSES]
    return trainer.step(QUERIES, responses, SCORES)


def test_a_step_without_upper_bound_stays_finite_where_an_advantage_is_zero(tmp_path):
    """Equal scores of the group make all advantages 0; the engine is 30 nats a token away."""
    options = {"loss_type": "rloo", "importance_correction": "truncate", "importance_level": "sequence"}
    far = Reporting(lambda row, logprobs: [number - 30.0 for number in logprobs])
    trainer = trainer_with(tmp_path, far, importance_max=None, kl_coef=0.0, **options)
    responses = trainer.generate(QUERIES, return_prompt=False)
    stats = trainer.step(QUERIES, responses, [torch.tensor(1.0)] * 8)
    assert stats["sampling/importance_weight_max"] > 1e30
    assert all(parameter.isfinite().all() for parameter in parameters(trainer).values())


def expected_weights(temperature, level, correction):
    """Of each row, from its log-probs alone."""
    found = []
    for pair, shift in zip(zip(QUERIES, RESPONSES, strict=True), SHIFTS, strict=True):
        with torch.no_grad():
            logprobs = row_logprobs(tiny_model(), *pair, temperature)
        differences = logprobs - (logprobs + shift).clamp(max=0.0)
        differences = differences.sum().expand_as(differences) if level == "sequence" else differences
        ratios = differences.exp()
        outside = (ratios > 1.2) | (ratios < 0.9)
        found.append(ratios.clamp(0.9, 1.2) if correction == "truncate" else ratios.masked_fill(outside, 0.0))
    return torch.nn.utils.rnn.pad_sequence(found, batch_first=True)


@pytest.mark.parametrize(
    ("loss_type", "level", "correction"),
    [
        ("ppo", "token", "truncate"),
        ("ppo", "sequence", "mask"),
        ("grpo", "token", "mask"),
        ("cispo", "sequence", "truncate"),
        ("rloo", "sequence", "mask"),
    ],
)
def test_the_update_is_the_one_of_advantages_times_the_weights(tmp_path, monkeypatch, loss_type, level, correction):
    """In micro-batches of so many tokens too; the KL is that of the policy that is trained, which has not moved."""
    options = {"loss_type": loss_type, "temperature": 0.7}
    corrected = CORRECTED | {"importance_correction": correction}
    corrected |= {} if level == "token" or loss_type == "rloo" else {"importance_level": level}
    trainer = trainer_with(tmp_path, Reporting(), tokens_per_micro_batch=30, **options, **corrected)
    stats = step_of(trainer)
    weights = expected_weights(0.7, level, correction)

    original = experience.estimate_advantages

    def weighed(rollouts, *more):
        original(rollouts, *more)
        rollouts.advantages_BR = rollouts.advantages_BR * weights

    plain = trainer_with(tmp_path, Reporting(reports=False), **options)
    before = parameters(plain)
    monkeypatch.setattr(experience, "estimate_advantages", weighed)
    plain.step(QUERIES, RESPONSES, SCORES)
    assert_same(parameters(trainer), parameters(plain))
    assert max(float((p - before[name]).abs().max()) for name, p in parameters(plain).items()) > 1e-3
    counted = torch.nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in RESPONSES], batch_first=True).bool()
    assert stats["sampling/importance_weight_mean"] == pytest.approx(float(weights[counted].mean()), abs=1e-4)
    assert stats["sampling/importance_weight_min"] == pytest.approx(float(weights[counted].min()), abs=1e-4)
    assert stats["sampling/importance_weight_max"] == pytest.approx(float(weights[counted].max()), abs=1e-4)
    assert abs(stats["objective/kl"]) < 1e-4


@pytest.mark.parametrize("loss_type", ["apa", "ppo"])
@pytest.mark.parametrize("exact_kl", [True, False])
def test_an_engines_log_probs_are_compared_and_not_taken_for_the_policys(tmp_path, loss_type, exact_kl):
    """The KL of a policy that has not moved is 0, whatever an engine says: from the pass before the update."""
    stats = step_of(trainer_with(tmp_path, Reporting(), loss_type=loss_type, exact_kl=exact_kl, mini_batch_size=8))
    assert abs(stats["objective/kl"]) < 1e-4
    assert ("objective/kl_at_first_visits" in stats) == (loss_type == "apa" and not exact_kl)
    differences = [(row, abs(shift)) for row, shift in zip(RESPONSES, SHIFTS, strict=True)]
    assert stats["sampling/logprob_difference_max"] <= 0.5 + 1e-4
    assert 0.05 < stats["sampling/logprob_difference_mean"] <= max(shift for _, shift in differences)
    assert "sampling/importance_weight_mean" not in stats


def test_tokens_that_an_engine_does_not_know_have_weight_1_and_are_not_compared(tmp_path):
    def first_unknown(row, logprobs):
        return [None if row == 0 else math.nan, *logprobs[1:]]

    stats = step_of(trainer_with(tmp_path, Reporting(first_unknown), loss_type="ppo", **CORRECTED))
    assert math.isfinite(stats["sampling/logprob_difference_mean"]) and math.isfinite(stats["objective/kl"])
    everything = step_of(
        trainer_with(tmp_path, Reporting(lambda row, lp: [None] * len(lp)), loss_type="ppo", **CORRECTED)
    )
    assert everything["sampling/logprob_difference_max"] == 0.0
    assert everything["sampling/importance_weight_min"] == everything["sampling/importance_weight_max"] == 1.0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda row, logprobs: logprobs[1:], "log-probs of other lengths than its responses"),
        (lambda row, logprobs: [0.5 if row == 3 else p for p in logprobs], "a log-prob of size "),
        (lambda row, logprobs: [-math.inf, *logprobs[1:]], "a log-prob of size inf"),
    ],
)
def test_log_probs_that_are_none_are_an_error(tmp_path, changed, message):
    trainer = trainer_with(tmp_path, Reporting(changed))
    with pytest.raises(ValueError, match=f"sampler gave {message}"):
        trainer.generate(QUERIES)


@pytest.mark.parametrize("options", [{"temperature": 0.5}, {"do_sample": False}])
def test_responses_of_another_distribution_are_not_compared(tmp_path, options):
    trainer = trainer_with(tmp_path, Reporting())
    responses = trainer.generate(QUERIES, return_prompt=False, **options)
    assert "sampling/logprob_difference_max" not in trainer.step(QUERIES, responses, SCORES)


def test_without_the_samplers_log_probs_one_warning_says_so_and_the_weights_are_1(tmp_path):
    trainer = trainer_with(tmp_path, Reporting(reports=False), loss_type="ppo", **CORRECTED)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stats = [step_of(trainer) for _ in range(2)][-1]
    told = [str(warning.message) for warning in caught if "importance_correction" in str(warning.message)]
    assert len(told) == 1 and "all weights are 1" in told[0]
    assert "sampling/importance_weight_mean" not in stats
    plain = trainer_with(tmp_path, Reporting(reports=False), loss_type="ppo")
    for _ in range(2):
        step_of(plain)
    assert_same(parameters(trainer), parameters(plain), tolerance=1e-30)


def test_responses_of_the_policy_itself_have_weights_near_1(tmp_path):
    options = {"batch_size": 8, "mini_batch_size": 4, "max_completion_length": 6, "loss_type": "ppo", **CORRECTED}
    trainer = tiny_trainer(tmp_path, **options)
    stats = trainer.step(QUERIES, trainer.generate(QUERIES, return_prompt=False), SCORES)
    assert stats["sampling/importance_weight_min"] == pytest.approx(1.0, abs=1e-3)
    assert stats["sampling/importance_weight_max"] == pytest.approx(1.0, abs=1e-3)


def _reinforce(tokens, args):
    return -masked_mean(tokens.advantages_BR * tokens.logprobs_BR, tokens.response_mask_BR, tokens.num_tokens), {}


REINFORCE = Algorithm(_reinforce, importance_levels=("token",))


def test_a_loss_of_ones_own_takes_it_if_it_says_so(tmp_path):
    """It reads no log-probs of the policy before the update; the correction does."""
    name = f"{__name__}:REINFORCE"
    results = [step_of(trainer_with(tmp_path, Reporting(), loss_type=name, **more)) for more in ({}, CORRECTED)]
    assert results[1]["sampling/importance_weight_max"] == pytest.approx(1.2)
    assert results[0]["apa/loss/policy"] != pytest.approx(results[1]["apa/loss/policy"], abs=1e-4)


@pytest.mark.parametrize("loss_type", ["apa", "awr", "mirror_descent", "rebel", "response_apa"])
def test_a_loss_without_a_ratio_takes_no_correction(tmp_path, loss_type):
    with pytest.raises(ValueError, match=f"importance_correction='mask' with loss_type='{loss_type}': .* ppo, grpo"):
        tiny_config(tmp_path, loss_type=loss_type, importance_correction="mask")


def test_options_that_make_no_sense_are_refused(tmp_path):
    for options, message in {
        ("importance_correction", "clip"): "importance_correction='clip': it should be 'truncate', 'mask' or None",
        ("importance_level", "row"): "importance_level='row' with loss_type='ppo': it should be 'token' or 'sequence'",
        ("importance_max", 0.0): "importance_max=0.0: it should be greater than 0",
        ("importance_min", 3.0): "importance_min=3.0 should be less than importance_max=3.0",
    }.items():
        with pytest.raises(ValueError, match=message):
            tiny_config(tmp_path, loss_type="ppo", **dict([options]))
        config = tiny_config(tmp_path, loss_type="ppo")
        with pytest.raises(ValueError, match=message):
            setattr(config, *options)
    with pytest.raises(ValueError, match="importance_level='token' with loss_type='rloo': it should be 'sequence'"):
        tiny_config(tmp_path, loss_type="rloo", importance_level="token")
    assert tiny_config(tmp_path, loss_type="rloo").importance_level == "sequence"
    assert tiny_config(tmp_path, loss_type="ppo").importance_level == "token"
    config = tiny_config(tmp_path, loss_type="grpo", importance_level="sequence")
    config.importance_level = None
    assert config.importance_level == "token"


class Random:
    """Draws tokens from torch's generator and claims that each had the same log-prob."""

    def sample(self, policy, prompts, request):
        ids = [torch.randint(2, 30, (limit,)).tolist() for limit in request.limits]
        return SampledTokens(ids, [[-3.3] * len(row) for row in ids])


def test_a_run_that_stops_within_an_iteration_goes_on_with_its_weights(tmp_path):
    options = {"loss_type": "ppo", "batch_size": 4, "mini_batch_size": 2, "max_completion_length": 4, "max_steps": 4}
    options |= {"optim": "sgd", "learning_rate": 0.1, **CORRECTED}
    straight = trainer_for(tmp_path / "straight", sampler=Random(), **options)
    straight.train()
    assert straight.run_state.iteration.rollouts.importance_weights_BR.unique().numel() > 2
    stopped = trainer_for(tmp_path / "stopped", sampler=Random(), callbacks=[StopAt(1)], save_steps=1, **options)
    stopped.train()
    resumed = trainer_for(tmp_path / "stopped", sampler=Random(), **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same(parameters(resumed), parameters(straight), tolerance=1e-30)
