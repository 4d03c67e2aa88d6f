"""`train()`: the same update under the Hugging Face Trainer, and picked up in the middle as if it had not stopped."""

import asyncio
import math

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast, TrainerCallback
from trl.rewards import get_repetition_penalty_reward, get_soft_overlong_punishment

from tests.test_update import assert_same
from tests.test_value_head import away_from_identity
from tests.tiny import CONFIGS, EOS, lora_config, tiny_config, tiny_model, tiny_tokenizer, word_tokenizer
from trl_apa import APATrainer
from trl_apa.rollout.prompts import PromptSource, prompt_of, query_of


PROMPTS = [f"w{2 + i % 9} w{3 + i % 7}" for i in range(16)]


def few_nines(completions, **kwargs):
    return [-float(text.split().count("w9")) + 0.1 * len(text.split()) for text in completions]


def length(completion_ids, target, **kwargs):
    return [-abs(len(ids) - wanted) / 4 for ids, wanted in zip(completion_ids, target, strict=True)]


def trainer_for(tmp_path, model=None, dataset=None, reward_funcs=few_nines, **options):
    names = ("eval_dataset", "callbacks", "reward_processing_classes", "value_model", "optimizer", "lr_scheduler")
    names += ("sampler", "peft_config")
    of_trainer = {name: options.pop(name) for name in names if name in options}
    config = {"max_completion_length": 5, "logging_steps": 1, "save_strategy": "no", "max_steps": 4, "seed": 3}
    dataset = Dataset.from_dict({"prompt": PROMPTS}) if dataset is None else dataset
    return APATrainer(
        tiny_config(tmp_path, **{**config, "mini_batch_size": 2, "ppo_epochs": 2, **options}),
        tiny_model() if model is None else model,
        tokenizer=tiny_tokenizer(),
        train_dataset=dataset,
        reward_funcs=reward_funcs,
        **of_trainer,
    )


def parameters(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def logged(trainer, *without):
    """The log without what the clock says."""
    timed = ("time/", "train_runtime", "train_samples", "train_steps", "total_flos", "eval_runtime")
    return [
        {name: value for name, value in row.items() if not name.startswith((*timed, *without))}
        for row in trainer.state.log_history
    ]


@pytest.mark.parametrize("loss_type", ["apa", "ppo"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_train_is_the_classic_loop(tmp_path, loss_type, accumulation):
    """The same prompts, sampled from the same random numbers, scored alike: the same parameters to the last bit."""
    options = {"loss_type": loss_type, "gradient_accumulation_steps": accumulation, "max_steps": 8 // accumulation}
    driven = trainer_for(tmp_path, **options)
    driven.train()
    looped = trainer_for(tmp_path, **options)
    source = PromptSource(looped.train_dataset, 4, seed=3)
    for iteration in range(2):
        queries = [torch.tensor(tiny_tokenizer()(row["prompt"])["input_ids"]) for row in source.rows(iteration)]
        responses = looped.generate(queries, batch_size=4, return_prompt=False)
        texts = tiny_tokenizer().batch_decode(responses, skip_special_tokens=True)
        stats = looped.step(queries, responses, [torch.tensor(score) for score in few_nines(texts)])
    assert driven.state.global_step == looped.state.global_step == 8 // accumulation
    assert_same(parameters(driven), parameters(looped), tolerance=1e-12)
    last = [row for row in driven.state.log_history if "apa/loss/total" in row][-1]
    for name in ("objective/kl", "apa/loss/total", "apa/mean_scores", "apa/grad_norm/policy", "objective/kl_coef"):
        assert last[name] == pytest.approx(stats[name], rel=1e-6), name


def test_gradient_checkpointing_changes_nothing(tmp_path):
    plain = trainer_for(tmp_path)
    plain.train()
    checkpointed = trainer_for(tmp_path, gradient_checkpointing=True)
    checkpointed.train()
    assert checkpointed.model.is_gradient_checkpointing
    assert_same(parameters(checkpointed), parameters(plain), tolerance=1e-6)


def test_the_log_has_losses_at_every_step_and_statistics_once_an_iteration(tmp_path):
    trainer = trainer_for(tmp_path, max_steps=8, logging_steps=2)
    trainer.train()
    rows = trainer.state.log_history
    assert [row["step"] for row in rows if "loss" in row] == [2, 4, 6, 8]
    assert [row["step"] for row in rows if "apa/mean_scores" in row] == [4, 8]
    # The Trainer's loss of an optimizer step is ours: the mean of the four steps of an iteration.
    losses = [row["loss"] for row in rows if "loss" in row]
    assert sum(losses[:2]) / 2 == pytest.approx(rows[1]["apa/loss/total"], rel=1e-5)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step
        control.should_save = control.should_training_stop


@pytest.mark.parametrize("stop", [1, 4, 7])
@pytest.mark.parametrize(("loss_type", "rows_at_a_time"), [("apa", None), ("ppo", 2)])
def test_a_run_goes_on_from_any_optimizer_step_as_if_it_had_not_stopped(tmp_path, stop, loss_type, rows_at_a_time):
    """In the middle of an epoch over the rollouts, between two iterations, and in the second: the same bits."""
    options = {"loss_type": loss_type, "max_steps": 12, "scale_rewards": True, "lr_scheduler_type": "linear"}
    options["generation_batch_size"] = rows_at_a_time
    whole = trainer_for(tmp_path / "whole", **options)
    whole.train()
    cut = trainer_for(tmp_path / "cut", callbacks=[StopAt(stop)], **options)
    cut.train()
    assert cut.state.global_step == stop
    again = trainer_for(tmp_path / "cut", model=tiny_model(seed=0), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{stop}"))
    assert_same(parameters(again), parameters(whole), tolerance=1e-30)
    assert logged(again, "train_loss")[:-1] == logged(whole, "train_loss")[:-1]
    assert again.kl_ctl.value == whole.kl_ctl.value and again.running_scores.count == whole.running_scores.count
    for mine, theirs in zip(again.optimizer.state.values(), whole.optimizer.state.values(), strict=True):
        assert mine.keys() == theirs.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(mine[name].equal(theirs[name]) for name in mine)


def test_epochs_count_passes_over_the_prompts_and_episodes_rollouts(tmp_path):
    trainer = trainer_for(tmp_path, max_steps=-1, num_train_epochs=2)
    trainer.train()
    # 16 prompts, 4 an iteration, 2 epochs of 2 mini-batches over each: 2 * 4 * 4 optimizer steps.
    assert trainer.state.global_step == 32 and trainer.num_iterations_done == 8
    assert trainer.state.epoch == 2.0
    trainer = trainer_for(tmp_path, max_steps=-1, total_episodes=9)
    trainer.train()
    assert trainer.num_iterations_done == 3


def test_prompts_come_in_an_order_that_seed_and_iteration_decide():
    source = PromptSource(PROMPTS, 4, seed=1)
    first_pass = [row["prompt"] for iteration in range(4) for row in source.rows(iteration)]
    assert sorted(first_pass) == sorted(PROMPTS) and first_pass != PROMPTS
    second_pass = [row["prompt"] for iteration in range(4, 8) for row in source.rows(iteration)]
    assert sorted(second_pass) == sorted(PROMPTS) and second_pass != first_pass
    assert source.rows(2) == PromptSource(PROMPTS, 4, seed=1).rows(2) != PromptSource(PROMPTS, 4, seed=2).rows(2)
    halves = [PromptSource(PROMPTS, 2, 1, process, 2).rows(3) for process in range(2)]
    assert halves[0] + halves[1] == source.rows(3)
    with pytest.raises(ValueError, match="train_dataset has 16 rows; one iteration needs 17"):
        PromptSource(PROMPTS, 17)


def test_a_stream_is_read_on_from_any_iteration_and_begins_again_at_its_end():
    stream = IterableDataset.from_generator(lambda: ({"prompt": prompt} for prompt in PROMPTS[:6]))
    source = PromptSource(stream, 4)
    texts = [[row["prompt"] for row in source.rows(iteration)] for iteration in range(3)]
    assert [text for rows in texts for text in rows] == (PROMPTS[:6] * 2)
    resumed = PromptSource(stream, 4)
    assert [row["prompt"] for row in resumed.rows(2)] == texts[2]


def test_a_stream_trains_for_max_steps(tmp_path):
    stream = IterableDataset.from_generator(lambda: ({"prompt": prompt} for prompt in PROMPTS))
    trainer = trainer_for(tmp_path, dataset=stream, max_steps=6)
    trainer.train()
    assert trainer.state.global_step == 6


def test_rows_may_be_texts_messages_or_token_ids(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'w30 ' if m['role'] == 'user' else 'w31 ' }}{{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}w31{% endif %}"
    )
    seen = []

    def remember(prompts, completions, completion_ids, **kwargs):
        seen.append((prompts, completions, completion_ids))
        return [float(len(ids)) for ids in completion_ids]

    datasets = {
        "list": PROMPTS,
        "query": Dataset.from_dict({"query": PROMPTS}),
        "ids": Dataset.from_dict({"input_ids": [tokenizer(text)["input_ids"] for text in PROMPTS]}),
        "chat": Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in PROMPTS]}),
    }
    queries = {}
    for kind, dataset in datasets.items():
        trainer = trainer_for(tmp_path, dataset=dataset, reward_funcs=remember, max_steps=1)
        trainer.processing_class.chat_template = tokenizer.chat_template
        trainer.train()
        queries[kind] = [query.tolist() for query in trainer.run_state.iteration.rollouts.queries]
    assert queries["list"] == queries["query"] == queries["ids"]
    assert queries["chat"] == [[30, *query, 31] for query in queries["list"]]
    assert [prompts for prompts, _, _ in seen[:3]] == [seen[0][0]] * 3
    prompts, completions, _ = seen[3]
    assert prompts[0] == [{"role": "user", "content": seen[0][0][0]}]
    assert completions[0][0]["role"] == "assistant" and isinstance(completions[0][0]["content"], str)


def test_long_prompts_keep_their_end_and_prompts_may_have_several_responses(tmp_path):
    trainer = trainer_for(tmp_path, max_steps=1, max_prompt_length=1, num_generations=2, temperature=1.0)
    trainer.train()
    rollouts = trainer.run_state.iteration.rollouts
    assert {len(query) for query in rollouts.queries} == {1}
    assert rollouts.queries[0].equal(rollouts.queries[1]) and rollouts.queries[2].equal(rollouts.queries[3])
    with pytest.raises(ValueError, match="num_generations=3: batch_size=4 should be a multiple"):
        tiny_config(tmp_path, num_generations=3)


def test_reward_functions_are_weighted_and_see_the_columns(tmp_path):
    dataset = Dataset.from_dict({"prompt": PROMPTS, "target": list(range(16))})

    async def later(completions, **kwargs):
        return [1.0] * len(completions)

    trainer = trainer_for(
        tmp_path, dataset=dataset, reward_funcs=[few_nines, length, later], reward_weights=[1, 2, 3], max_steps=1
    )
    trainer.train()
    rollouts = trainer.run_state.iteration.rollouts
    rows = PromptSource(dataset, 4, seed=3).rows(0)
    texts = tiny_tokenizer().batch_decode(rollouts.responses, skip_special_tokens=True)
    lengths = length([r.tolist() for r in rollouts.responses], [row["target"] for row in rows])
    expected = [a + 2 * b + 3 for a, b in zip(few_nines(texts), lengths, strict=True)]
    assert rollouts.scores_B.tolist() == pytest.approx(expected)
    scores = trainer.score(rollouts.queries, rollouts.responses, target=[row["target"] for row in rows])
    assert [float(score) for score in scores] == pytest.approx(expected)


def test_rewards_given_token_by_token_stay_on_their_tokens(tmp_path):
    """Weights 1 and 0.5; the score of the first function goes to the last token, as ever."""

    def per_token(completion_ids, **kwargs):
        return [[float(token) for token in ids] for ids in completion_ids]

    def one(completion_ids, **kwargs):
        return [3.0] * len(completion_ids)

    options = {"reward_weights": [1.0, 0.5], "max_steps": 1, "whiten_advantages": False, "gae_lambda": 1.0}
    trainer = trainer_for(tmp_path, reward_funcs=[one, per_token], **options)
    trainer.train()
    rollouts = trainer.run_state.iteration.rollouts
    for row, response in enumerate(rollouts.responses):
        expected = [0.5 * float(token) for token in response]
        expected[-1] += 3.0
        assert rollouts.rewards_BR[row, : len(response)].tolist() == pytest.approx(expected)
        assert float(rollouts.scores_B[row]) == pytest.approx(sum(expected))
        # The value model starts at zero, so with lambda = gamma = 1 a return is what is still to come.
        assert float(rollouts.returns_BR[row, 0]) == pytest.approx(sum(expected), rel=1e-4)

    def too_few(completion_ids, **kwargs):
        return [[1.0] * (len(ids) - 1) for ids in completion_ids]

    with pytest.raises(ValueError, match=r"too_few gave \d values for the \d tokens of row 0"):
        trainer_for(tmp_path, reward_funcs=too_few).train()


def test_score_clip_and_centring_hold_for_the_total_of_a_response_with_rewards_token_by_token(tmp_path):
    """The scores are large and far from 0: shaped apart from the tokens' rewards, they would exceed the clip."""

    def per_token(completion_ids, **kwargs):
        return [[10.0 + token for token in ids] for ids in completion_ids]

    def quality(completion_ids, **kwargs):
        return [100.0 - len(ids) ** 2 for ids in completion_ids]

    options = {"scale_rewards": True, "center_rewards": True, "score_clip": 0.7, "max_steps": 1}
    trainer = trainer_for(tmp_path, reward_funcs=[quality, per_token], **options)
    trainer.train()
    rollouts, running = trainer.run_state.iteration.rollouts, trainer.running_scores
    centred = (rollouts.scores_B - running.mean) / running.std
    totals = rollouts.rewards_BR.sum(dim=1)
    torch.testing.assert_close(totals, centred.clamp(-0.7, 0.7))
    assert (totals.abs() < 0.699).any() and (centred.abs() > 0.701).any()


def test_responses_without_a_score_are_left_out_when_asked(tmp_path):
    """The update is that of the other rows alone, whatever the row that is left out holds."""
    kept = {}

    def picky(completions, **kwargs):
        return [None if i == 1 else score for i, score in enumerate(few_nines(completions))]

    for replaced in (False, True):
        trainer = trainer_for(
            tmp_path, reward_funcs=picky, skip_unscored=True, max_steps=1, mini_batch_size=4, ppo_epochs=1
        )
        if replaced:
            collect = trainer._collect

            def other_row(queries, responses, *rest, collect=collect):
                return collect(
                    queries, [torch.tensor([7, 8]) if i == 1 else r for i, r in enumerate(responses)], *rest
                )

            trainer._collect = other_row
        trainer.train()
        rollouts = trainer.run_state.iteration.rollouts
        assert rollouts.response_mask_BR.any(dim=1).tolist() == [True, False, True, True]
        kept[replaced] = parameters(trainer)
    assert_same(kept[False], kept[True], tolerance=1e-6)
    stats = trainer.state.log_history[0]
    scores_B = rollouts.scores_B[rollouts.response_mask_BR.any(dim=1)]
    assert stats["apa/mean_scores"] == pytest.approx(float(scores_B.mean()))
    lengths = [len(response) for i, response in enumerate(rollouts.responses) if i != 1]
    assert stats["tokens/responses_len_mean"] == pytest.approx(sum(lengths) / 3)


def test_reward_functions_of_trl_are_understood(tmp_path):
    trainer = trainer_for(
        tmp_path,
        reward_funcs=[get_soft_overlong_punishment(4, 2), get_repetition_penalty_reward(2)],
        max_steps=4,
    )
    trainer.train()
    lengths = [len(response) for response in trainer.run_state.iteration.rollouts.responses]
    soft = [0.0 if n <= 2 else (2 - n) / 2 if n <= 4 else -1.0 for n in lengths]
    rollouts = trainer.run_state.iteration.rollouts
    answers = [{"prompt": "w2"}] * 4, rollouts.queries, rollouts.responses
    scores = trainer._scores(trainer._texts(*answers), *answers)
    assert scores.by_function_BF[:, 0].tolist() == pytest.approx(soft)


def test_completions_are_printed_and_kept_as_parquet(tmp_path, capsys):
    """Two iterations; the terminal shows one row of each, and drawing it changes nothing."""
    plain = trainer_for(tmp_path / "plain", max_steps=8)
    plain.train()
    options = {"log_completions": True, "num_completions_to_print": 1, "max_steps": 8}
    trainer = trainer_for(tmp_path, eval_dataset=PROMPTS[:3], **options)
    capsys.readouterr()
    trainer.train()
    assert_same(parameters(trainer), parameters(plain), tolerance=1e-30)
    printed = capsys.readouterr().out
    assert "Step 0" in printed and "Step 4" in printed and "few_nines" in printed
    files = sorted((tmp_path / "completions").iterdir())
    assert [file.name for file in files] == ["completions_000000.parquet", "completions_000004.parquet"]
    table = Dataset.from_parquet(str(files[1]), cache_dir=tmp_path / "cache")
    assert table.column_names == ["prompt", "completion", "rewards/few_nines", "reward"]
    responses = trainer.run_state.iteration.rollouts.responses
    assert list(table["completion"]) == tiny_tokenizer().batch_decode(responses, skip_special_tokens=True)
    assert list(table["reward"]) == pytest.approx(few_nines(table["completion"]))
    trainer.generate_completions(sampling=True)
    assert len(Dataset.from_parquet(str(tmp_path / "completions" / "completions_000008.parquet"))) == 3


def test_the_progress_bar_shows_reward_and_kl_and_not_every_number(tmp_path, capsys):
    trainer = trainer_for(tmp_path, disable_tqdm=False)
    trainer.train()
    captured = capsys.readouterr()
    last = [row for row in trainer.state.log_history if "apa/mean_scores" in row][-1]
    assert f"reward={last['apa/mean_scores']:.3g}" in captured.err and f"KL={last['objective/kl']:.3g}" in captured.err
    assert "apa/grad_norm" not in captured.out + captured.err


def test_what_reward_functions_are_given_and_may_give(tmp_path):
    """A column named like an argument gives way, names are told apart, a running event loop is no obstacle."""
    dataset = Dataset.from_dict({"prompt": PROMPTS, "completions": ["from the data"] * 16})
    seen = []

    def reward(completions, **kwargs):
        seen.extend(completions)
        return np.arange(4.0)

    async def later(completions, **kwargs):
        return torch.ones(4)

    trainer = trainer_for(tmp_path, dataset=dataset, reward_funcs=[reward, reward, later], max_steps=1)
    assert trainer.scorer.names == ["reward", "reward_2", "later"]
    trainer.train()
    assert "from the data" not in seen
    assert trainer.run_state.iteration.rollouts.scores_B.tolist() == [1.0, 3.0, 5.0, 7.0]

    async def in_a_notebook():
        rollouts = trainer.run_state.iteration.rollouts
        return trainer.score(rollouts.queries, rollouts.responses)

    assert [float(score) for score in asyncio.run(in_a_notebook())] == [1.0, 3.0, 5.0, 7.0]
    answers = {
        "gave None; it should give a list of numbers": lambda **kwargs: None,
        "gave 'x' for row 0": lambda **kwargs: ["x"] * 4,
        "gave inf for row 0": lambda **kwargs: [math.inf] * 4,
        "gave numbers for some rows and lists for others": lambda completion_ids, **kwargs: [
            1.0,
            *([0.0] * len(ids) for ids in completion_ids[1:]),
        ],
    }
    for message, function in answers.items():
        with pytest.raises(ValueError, match=message):
            trainer_for(tmp_path, reward_funcs=function, skip_unscored=True).train()


def test_score_hands_over_what_train_hands_over(tmp_path):
    lengths = []

    def remember(completion_ids, **kwargs):
        lengths.extend(len(ids) for ids in completion_ids)
        return [1.0, *[None] * (len(completion_ids) - 1)]

    trainer = trainer_for(tmp_path, model=tiny_model("t5"), reward_funcs=remember, skip_unscored=True)
    responses = trainer.generate([torch.tensor([5, 6])], do_sample=False, max_new_tokens=3, eos_token_id=99)
    assert len(responses[0]) == 4
    assert trainer.score([torch.tensor([5, 6])], responses) == [torch.tensor(1.0)] and lengths == [3]
    with pytest.raises(ValueError, match=r"rows \[1\] were not scored, and step cannot skip a response"):
        trainer.score([torch.tensor([5, 6])] * 2, responses * 2)


def test_an_answer_that_the_prompt_began_is_one_message(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    trainer = trainer_for(tmp_path)
    trainer.processing_class = tokenizer
    messages = [{"role": "user", "content": "w4"}, {"role": "assistant", "content": "w5 "}]
    prompts, completions = trainer._texts([{"prompt": messages}], [torch.tensor([4, 5])], [torch.tensor([6, EOS])])
    assert prompts == [messages[:1]] and completions == [[{"role": "assistant", "content": "w5 w6"}]]


def test_a_classifier_without_a_tokenizer_of_its_own_reads_ids_and_a_chat_template_of_its_own_is_kept(tmp_path):
    torch.manual_seed(5)
    config = CONFIGS["llama"]()
    config.num_labels = 1
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "bare")
    assert trainer_for(tmp_path, reward_funcs=str(tmp_path / "bare")).scorer.functions[0].tokenizer is None
    own = tiny_tokenizer()
    own.chat_template = "{% for m in messages %}w30 {{ m['content'] }} {% endfor %}"
    options = {"reward_funcs": str(tmp_path / "bare"), "reward_processing_classes": own}
    assert trainer_for(tmp_path, **options).scorer.functions[0].tokenizer is own


def test_empty_columns_do_not_hide_the_one_that_holds_the_prompt():
    tokenizer = tiny_tokenizer()
    row = {"prompt": None, "query": "w4", "input_ids": None}
    assert query_of(row, tokenizer).tolist() == [4]
    with pytest.raises(ValueError, match=r"columns \[\]; it should have prompt"):
        prompt_of({"prompt": None, "input_ids": None})


def test_episodes_count_rollouts_also_where_epochs_are_left_out(tmp_path):
    options = {"early_stopping": True, "target_kl": 1e-9, "ppo_epochs": 4, "learning_rate": 0.05}
    trainer = trainer_for(tmp_path, max_steps=-1, total_episodes=8, **options)
    trainer.train()
    assert trainer.num_iterations_done == 2 and trainer.state.global_step < 16


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_a_reward_model_scores_the_last_token_even_if_pad_is_eos(tmp_path, pad_is_eos):
    torch.manual_seed(5)
    config = CONFIGS["llama"]()
    config.num_labels = 1
    reward_model = AutoModelForSequenceClassification.from_config(config)
    if pad_is_eos:
        reward_model.config.pad_token_id = EOS
    trainer = trainer_for(tmp_path, reward_funcs=reward_model, max_steps=4)
    queries = [torch.tensor([5, 6, 7]), torch.tensor([8])]
    responses = [torch.tensor([9, EOS]), torch.tensor([10, 11, 12])]
    scores = [float(score) for score in trainer.score(queries, responses)]
    for query, response, score in zip(queries, responses, scores, strict=True):
        ids = torch.cat([query, response])[None]
        with torch.no_grad():
            hidden = reward_model.base_model(input_ids=ids).last_hidden_state[0, -1]
        assert score == pytest.approx(float(reward_model.score(hidden)[0].detach()), rel=1e-4)
    before = {name: p.clone() for name, p in reward_model.named_parameters()}
    trainer.train()
    assert all(p.equal(before[name]) for name, p in reward_model.named_parameters())
    # From a folder with its own tokenizer, the same.
    reward_model.save_pretrained(tmp_path / "rm")
    tiny_tokenizer().save_pretrained(tmp_path / "rm")
    named = trainer_for(tmp_path, reward_funcs=str(tmp_path / "rm"))
    assert named.scorer.names == ["rm"]
    assert [float(score) for score in named.score(queries, responses)] == pytest.approx(scores, rel=1e-4)


@pytest.mark.parametrize("pad", [EOS, None])
def test_a_reward_model_with_adapters_scores_as_the_merged_one(tmp_path, pad):
    """In memory and by name; the score layer was trained with the adapter."""
    torch.manual_seed(5)
    config = CONFIGS["llama"]()
    config.num_labels = 1
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    adapted = away_from_identity(get_peft_model(base, lora_config(task_type="SEQ_CLS")), seed=7)
    with torch.no_grad():
        adapted.get_base_model().score.modules_to_save["default"].weight.mul_(2)
    adapted.save_pretrained(tmp_path / "reward")
    adapted.config.pad_token_id = pad
    queries, responses = [torch.tensor([5, 6, 7]), torch.tensor([8])], [torch.tensor([9, EOS]), torch.tensor([10])]
    named, given = (trainer_for(tmp_path, reward_funcs=reward) for reward in (str(tmp_path / "reward"), adapted))
    expected = [float(score) for score in named.score(queries, responses)]
    assert [float(score) for score in given.score(queries, responses)] == pytest.approx(expected, rel=1e-4)
    assert not isinstance(named.scorer.functions[0].model, PeftModel)
    merged = adapted.merge_and_unload()
    ids = torch.cat([queries[0], responses[0]])[None]
    with torch.no_grad():
        by_hand = float(merged.score(merged.base_model(input_ids=ids).last_hidden_state[0, -1])[0])
    assert expected[0] == pytest.approx(by_hand, rel=1e-4)


def test_a_language_model_is_no_reward_model(tmp_path):
    tiny_model().save_pretrained(tmp_path / "policy")
    with pytest.raises(ValueError, match=r"is no trained reward model: it has no weights for score\.weight"):
        trainer_for(tmp_path, reward_funcs=str(tmp_path / "policy"))


def test_evaluation_compares_with_the_reference_and_takes_no_random_number_from_training(tmp_path):
    held_out = Dataset.from_dict({"prompt": PROMPTS[:5]})
    plain = trainer_for(tmp_path / "plain", max_steps=8, learning_rate=0.03)
    plain.train()
    options = {"eval_strategy": "steps", "eval_steps": 4, "per_device_eval_batch_size": 2, "learning_rate": 0.03}
    trainer = trainer_for(tmp_path, eval_dataset=held_out, max_steps=8, **options)
    first = trainer.evaluate()
    # Two samples of one policy: same law of the reward, KL exactly zero.
    assert first["eval_kl"] == pytest.approx(0.0, abs=1e-5)
    assert 0 <= first["eval_win_rate"] <= 1 and first["eval_reward_std"] >= 0
    trainer.train()
    assert_same(parameters(trainer), parameters(plain), tolerance=1e-12)
    rows = [row for row in trainer.state.log_history if "eval_reward" in row]
    assert [row["step"] for row in rows] == [4, 8]
    assert rows[0]["eval_kl"] != rows[1]["eval_kl"]
    assert trainer.evaluate(eval_dataset={"a": held_out})["eval_a_kl"] == pytest.approx(rows[-1]["eval_kl"])


def test_the_best_checkpoint_by_reward_is_loaded_at_the_end(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 8}
    trainer = trainer_for(
        tmp_path,
        eval_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        load_best_model_at_end=True,
        metric_for_best_model="eval_reward",
        greater_is_better=True,
        learning_rate=0.05,
        save_total_limit=2,
        **options,
    )
    trainer.train()
    best = max((row for row in trainer.state.log_history if "eval_reward" in row), key=lambda row: row["eval_reward"])
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best['step']}")
    kept = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert len(kept) == 2 and {f"checkpoint-{best['step']}", "checkpoint-8"} <= kept
    assert trainer.evaluate()["eval_reward"] == pytest.approx(best["eval_reward"])


def test_training_raises_the_reward(tmp_path):
    """Reward 1 for answering with one word: chance is about 1 in 30 a token, and the run ends above a half."""

    def fives(completion_ids, **kwargs):
        return [sum(token == 5 for token in ids) / 5 for ids in completion_ids]

    options = {"batch_size": 16, "mini_batch_size": 16, "ppo_epochs": 4, "max_steps": 60, "learning_rate": 3e-3}
    trainer = trainer_for(tmp_path, model=tiny_model(scale=1.0), reward_funcs=fives, eval_dataset=PROMPTS, **options)
    before = trainer.evaluate()["eval_reward"]
    trainer.train()
    assert before < 0.2 < 0.5 < trainer.evaluate()["eval_reward"]


def test_a_classifier_with_other_tokens_gets_the_text_and_one_with_an_added_pad_the_ids(tmp_path):
    torch.manual_seed(5)
    config = CONFIGS["llama"]()
    config.num_labels = 1
    reward_model = AutoModelForSequenceClassification.from_config(config)
    padded = tiny_tokenizer()
    padded.add_special_tokens({"pad_token": "[PAD]"})
    reversed_words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": 33 - i for i in range(2, 32)}}
    other = PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer(reversed_words), pad_token="<pad>", eos_token="<eos>"
    )
    query, response = torch.tensor([5, 6, 7]), torch.tensor([8, EOS])

    def score(tokenizer):
        trainer = trainer_for(tmp_path, reward_funcs=reward_model, reward_processing_classes=tokenizer)
        return float(trainer.score([query], [response])[0])

    def expected(ids):
        with torch.no_grad():
            hidden = reward_model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
            return float(reward_model.score(hidden)[0])

    assert score(padded) == pytest.approx(expected([5, 6, 7, 8, EOS]), rel=1e-4)
    # w5 w6 w7 w8 are 28 27 26 25 to the other, and its EOS ends what has ended.
    assert score(other) == pytest.approx(expected([28, 27, 26, 25, EOS]), rel=1e-4)
    response = torch.tensor([8, 9])
    assert score(other) == pytest.approx(expected([28, 27, 26, 25, 24]), rel=1e-4)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda completions, **kwargs: [1.0], "gave 1 values for 4 responses"),
        (lambda completions, **kwargs: [1.0, None, 1.0, 1.0], "gave None for row 1"),
        (lambda completions, **kwargs: [1.0, 1.0, float("nan"), 1.0], "gave nan for row 2"),
    ],
)
def test_a_reward_function_that_gives_nonsense_is_named(tmp_path, broken, message):
    broken.__name__ = "broken"
    with pytest.raises(ValueError, match=f"reward function broken {message}"):
        trainer_for(tmp_path, reward_funcs=broken).train()


def test_what_train_and_evaluate_need_is_asked_for(tmp_path):
    with pytest.raises(ValueError, match="needs reward_funcs or reward_model"):
        trainer_for(tmp_path, reward_funcs=None).train()
    with pytest.raises(ValueError, match=r"evaluate\(\) needs eval_dataset"):
        trainer_for(tmp_path).evaluate()
    with pytest.raises(ValueError, match="reward_funcs has a int"):
        trainer_for(tmp_path, reward_funcs=3)
    with pytest.raises(ValueError, match="reward_weights has 2 elements; there are 1"):
        trainer_for(tmp_path, reward_weights=[1.0, 2.0])
    with pytest.raises(ValueError, match=r"columns \['text'\]; it should have prompt"):
        trainer_for(tmp_path, dataset=Dataset.from_dict({"text": PROMPTS})).train()
