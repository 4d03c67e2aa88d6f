"""Rows that are read separately give the numbers and the update of a padded batch, where that one is right."""

import copy

import pytest
import torch
from datasets import Dataset

from tests.families import alone_logprobs, family_model
from tests.test_offline import trainer_of
from tests.test_training import StopAt, few_nines, logged, parameters, trainer_for
from tests.test_update import assert_same, learner, parameters_after_step
from tests.tiny import START, lora_config, tiny_config, tiny_model, tiny_rollouts, tiny_tokenizer, tiny_trainer
from trl_apa import APATrainer
from trl_apa.evaluation import held_out as evaluation
from trl_apa.models.logprobs import policy_outputs
from trl_apa.rollout.batch import Layout, lay_out, longest_row


SEPARATE, ONE_BY_ONE, PADDED = Layout.SEPARATE, Layout.ONE_BY_ONE, Layout.PADDED
QUERIES = [torch.tensor(row) for row in ([5, 6, 7], [8], [9, 10], [4, 3, 2], [11, 12], [13])]
RESPONSES = [torch.tensor(row) for row in ([3, 4], [5, 6, 7, 8], [9], [10, 11], [6, 7, 8, 9], [2, 3, 4, 5])]
LONG_AND_SHORT = [" ".join(["w7", "w4", "w9", "w2", "w5", "w3"][: 1 + i % 6]) for i in range(16)]


class Always:
    """In the place of a trainer's `Layouts`."""

    def __init__(self, layout):
        self.layout, self.asked = layout, 0

    def __call__(self, longest, packable=True, share=False):
        self.asked += 1
        return self.layout

    def try_up_to(self, longest):
        pass


def reading(trainer, layout):
    trainer.layouts = trainer._layout = Always(layout)
    return trainer


@pytest.mark.parametrize("layout", [SEPARATE, ONE_BY_ONE])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bart"])
@pytest.mark.parametrize("own_forward", [False, True])
def test_all_that_is_read_of_rows_is_that_of_a_padded_batch(family, layout, own_forward):
    """A row with an empty response and several of one length among them; by trunk and head, and by the own forward."""
    model = tiny_model(family, dtype=torch.float64).eval()
    start = START if model.config.is_encoder_decoder else None
    responses = [*RESPONSES[:2], RESPONSES[2][:0], *RESPONSES[3:]]
    outputs = []
    for layout_of in (PADDED, layout):
        tokens = lay_out(layout_of, QUERIES, responses, 0, start)
        options = {"with_entropy": True, "with_hidden": True, "with_logits": own_forward, "own_forward": own_forward}
        outputs.append(policy_outputs(model, tokens, 4, 0.7, **options))
    counted_BR = torch.tensor([[position < len(row) for position in range(4)] for row in responses])
    for name in ("logprobs_BR", "entropy_BR", "hidden_BRH", *(["logits_BRV"] if own_forward else [])):
        padded, separate = (getattr(output, name)[counted_BR] for output in outputs)
        torch.testing.assert_close(separate, padded, rtol=1e-7, atol=1e-7, msg=name)
        assert not getattr(outputs[1], name)[~counted_BR].any()


SETUPS = {
    "separate value model": ({}, {}),
    "head": ({"value_model": "head"}, {}),
    "adapter": ({"peft_config": lora_config(), "value_model": "adapter"}, {}),
    "gradient checkpointing": ({"peft_config": lora_config()}, {"gradient_checkpointing": True}),
    "ppo": ({}, {"loss_type": "ppo"}),
    "full KL": ({}, {"loss_type": "ppo", "kl_penalty": "full"}),
}


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_an_update_is_that_of_padded_batches(tmp_path, setup, family):
    kwargs, options = SETUPS[setup]
    if family == "t5" and "adapter" in setup:
        pytest.skip("an encoder-decoder has no value model on its base")
    if "peft_config" in kwargs and family == "t5":
        kwargs = {**kwargs, "peft_config": lora_config(task_type="SEQ_2_SEQ_LM")}
    results, stats = [], []
    for layout in (PADDED, SEPARATE, ONE_BY_ONE):
        trainer = tiny_trainer(tmp_path, tiny_model(family), kwargs, mini_batch_size=2, optim="sgd", **options)
        reading(trainer, layout)
        torch.manual_seed(1)
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name or name.endswith("head.out.weight") or "value_model.weight" in name:
                torch.nn.init.normal_(parameter)
        results.append(parameters_after_step(trainer, *tiny_rollouts()))
        stats.append(trainer.step(*tiny_rollouts()))
        assert trainer.layouts.asked > 2
    for result, stat in zip(results[1:], stats[1:], strict=True):
        assert_same(result, results[0], tolerance=2e-5)
        for name in ("objective/kl", "objective/entropy", "apa/loss/total", "apa/val/vpred", "apa/policy/approxkl"):
            if name in stat:
                assert stat[name] == pytest.approx(stats[0][name], rel=1e-3, abs=1e-5), name


def some_without_a_score(completions, **kwargs):
    scores = few_nines(completions)
    return [None if number == 1 or "w9" in text else scores[number] for number, text in enumerate(completions)]


def test_responses_that_are_left_out_do_not_count(tmp_path):
    """Also where a call of a network has none that counts."""
    results = []
    for layout in (PADDED, SEPARATE, ONE_BY_ONE):
        options = {"dataset": Dataset.from_dict({"prompt": LONG_AND_SHORT}), "skip_unscored": True}
        trainer = reading(trainer_for(tmp_path, reward_funcs=some_without_a_score, **options), layout)
        trainer.train()
        results.append(parameters(trainer))
    for result in results[1:]:
        assert_same(result, results[0], tolerance=2e-5)


@pytest.mark.parametrize("loss_type", ["apa", "awr", "ilql"])
def test_offline_learning_reads_rows_separately_too(tmp_path, loss_type):
    columns = zip(QUERIES, RESPONSES, strict=True)
    rows = [{"input_ids": q.tolist(), "completion_ids": r.tolist(), "reward": 0.2 * len(r)} for q, r in columns]
    results = []
    for layout in (PADDED, SEPARATE):
        trainer = trainer_of(tmp_path, rows, tiny_model(), loss_type=loss_type, max_steps=3)
        trainer.layouts, trainer._layout = Always(layout), layout
        trainer.train()
        results.append(parameters(trainer))
    assert_same(*results, tolerance=2e-5)


@pytest.mark.parametrize(
    "family", ["longrope", *(pytest.param(f, marks=pytest.mark.slow) for f in ("griffin", "dynamic RoPE"))]
)
@pytest.mark.filterwarnings("ignore:.*rows are processed one by one")
def test_a_run_is_resumed_as_if_it_had_not_stopped(tmp_path, family):
    """In the middle of an iteration, whose rows cross the boundaries of the config by then."""
    options = {"max_steps": 8, "max_completion_length": 9, "dataset": Dataset.from_dict({"prompt": LONG_AND_SHORT})}
    complete = trainer_for(tmp_path / "complete", model=family_model(family), **options)
    complete.train()
    stopped = trainer_for(tmp_path / "stopped", model=family_model(family), callbacks=[StopAt(3)], **options)
    stopped.train()
    resumed = trainer_for(tmp_path / "stopped", model=family_model(family), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-3"))
    assert_same(parameters(resumed), parameters(complete), tolerance=1e-30)
    assert logged(resumed, "train_loss")[:-1] == logged(complete, "train_loss")[:-1]


@pytest.mark.parametrize("family", ["griffin", "longrope", "rwkv"])
@pytest.mark.filterwarnings("ignore:.*rows are processed one by one")
def test_an_evaluation_measures_what_each_row_has_alone(tmp_path, monkeypatch, family):
    """KL to another pi_init, of answers that are sampled in the evaluation."""
    model, ref_model, measured = family_model(family), family_model(family, scale=3.0), []

    def noted(trainer, steps, episodes):
        nats = measure(trainer, steps, episodes)
        measured.append((episodes.queries, episodes.responses, nats["kl"]))
        return nats

    measure = evaluation._kl_and_entropy
    monkeypatch.setattr(evaluation, "_kl_and_entropy", noted)
    trainer = APATrainer(
        tiny_config(tmp_path, max_completion_length=9),
        copy.deepcopy(model),
        ref_model=copy.deepcopy(ref_model),
        tokenizer=tiny_tokenizer(),
        eval_dataset=Dataset.from_dict({"prompt": LONG_AND_SHORT}),
        reward_funcs=few_nines,
    )
    trainer.evaluate()
    assert sum(len(queries) for queries, _, _ in measured) == len(LONG_AND_SHORT)
    for queries, responses, kl_B in measured:
        pairs = zip(*(alone_logprobs(network, queries, responses) for network in (model, ref_model)), strict=True)
        expected = torch.stack([(logprobs - ref_logprobs).sum() for logprobs, ref_logprobs in pairs])
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(kl_B.float(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.filterwarnings("ignore:.*rows are processed one by one")
def test_values_are_those_of_each_row_alone(tmp_path):
    trainer = learner(tmp_path, family_model("griffin"))
    value_model, (queries, responses, _) = trainer.model.value_model, tiny_rollouts()
    tokens = lay_out(trainer.layouts(longest_row(queries, responses)), queries, responses, 0)
    width = max(len(response) for response in responses)
    with torch.no_grad():
        values_BR = trainer.model(**tokens, response_width=width, with_policy=False)["values"]
        for row, query, response in zip(values_BR, queries, responses, strict=True):
            hidden = value_model.trunk(torch.cat([query, response])[None], use_cache=False).last_hidden_state[0]
            alone = value_model.head(hidden[len(query) - 1 : -1]).flatten()
            assert alone.abs().max() > 0.1
            torch.testing.assert_close(row[: len(response)], alone, rtol=1e-4, atol=1e-4)
