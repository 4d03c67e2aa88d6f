"""What is measured on held-out prompts: against hand-worked values and a naive loop."""

import json
import math

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests._cli import run
from tests.test_cli import jsonl, make_model
from tests.tiny import EOS, VOCABULARY, lora_config, tiny_model, tiny_tokenizer, tiny_trainer
from trl_apa.commands.evaluate import COLUMNS, WINS, table
from trl_apa.evaluation.held_out import distinct_ngrams, held_out_metrics, standard_error
from trl_apa.offline import OfflineAPATrainer, OfflineConfig


PROMPTS = ["w2 w3 w4", "w5", "w6 w7", "w8 w9 w10"]


@pytest.mark.parametrize(
    ("texts", "n", "expected"),
    [
        (["a b a", "b c"], 1, 3 / 5),
        # ab, ba, bc: no pair goes over the end of a text
        (["a b a", "b c"], 2, 1.0),
        (["a b", "a b", "a"], 2, 1 / 2),
        (["a", ""], 2, 0.0),
        ([[1, 2, 1, 2], [1, 2], [3]], 1, 3 / 7),
        ([[1, 2, 1, 2], [1, 2], [3]], 2, 2 / 4),
        ([[3]], 2, 0),
    ],
)
def test_distinct_ngrams_by_hand(texts, n, expected):
    assert distinct_ngrams(texts, n) == expected


def measured(tmp_path, model, **options):
    trainer_kwargs = {"reward_funcs": lambda completions, **columns: [1.0] * len(completions), "eval_dataset": PROMPTS}
    options = {"per_device_eval_batch_size": 3, "max_completion_length": 5, **options}
    return tiny_trainer(tmp_path, model, trainer_kwargs, **options).evaluate()


def test_a_policy_that_draws_any_token_has_the_largest_entropy(tmp_path):
    model = tiny_model()
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    metrics = measured(tmp_path, model)
    assert metrics["eval_entropy"] == pytest.approx(math.log(VOCABULARY), rel=1e-5)
    assert 0 < metrics["eval_distinct_1"] <= 1


def test_entropy_is_a_mean_over_tokens_and_does_not_depend_on_the_batches(tmp_path, monkeypatch):
    seen = []
    decode = type(tiny_tokenizer()).batch_decode
    monkeypatch.setattr(
        type(tiny_tokenizer()), "batch_decode", lambda self, ids, **kw: seen.append(ids) or decode(self, ids, **kw)
    )
    model = tiny_model(scale=1.5)
    metrics = measured(tmp_path, model, per_device_eval_batch_size=4)
    # The last texts that are made are the policy's responses.
    total, count = 0.0, 0
    tokenizer = tiny_tokenizer()
    for prompt, response in zip(PROMPTS, seen[-1], strict=True):
        query = torch.tensor(tokenizer(prompt)["input_ids"])
        with torch.no_grad():
            logits = model(torch.cat([query, response])[None]).logits[0, len(query) - 1 : -1]
        total += float(torch.distributions.Categorical(logits=logits).entropy().sum())
        count += len(response)
    assert len({len(response) for response in seen[-1]}) > 1, "all responses have one length: the mean is not tested"
    assert metrics["eval_entropy"] == pytest.approx(total / count, rel=1e-4)


def trainers(folder, policy, ref_model, reward_funcs, **options):
    """An online and an offline trainer of one policy, which evaluate with equal options."""
    options = {"per_device_eval_batch_size": 3, "max_completion_length": 5, "temperature": 0.9, **options}
    given = {"ref_model": ref_model, "reward_funcs": reward_funcs, "eval_dataset": PROMPTS}
    config = OfflineConfig(str(folder), report_to="none", use_cpu=True, **options)
    rows = [{"prompt": "w2", "completion": "w3", "reward": 1.0}]
    offline = OfflineAPATrainer(config, policy, processing_class=tiny_tokenizer(), train_dataset=rows, **given)
    return {"online": tiny_trainer(folder, policy, given, **options), "offline": offline}


@pytest.mark.parametrize("kind", ["online", "offline"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_means_are_those_of_a_loop_over_the_rows_by_themselves(tmp_path, kind, family):
    """Three rows in the first batch and one in the last: a mean of the batches' means would be another number."""
    policy, ref_model, seen = tiny_model(family, scale=1.5), tiny_model(family, seed=1, scale=1.5), []

    def longer(prompts, completions, completion_ids, **columns):
        seen.extend(zip(prompts, completion_ids, strict=True))
        return [len(ids) + 0.1 * sum(ids) for ids in completion_ids]

    trainer = trainers(tmp_path, policy, ref_model, longer)[kind]
    metrics = held_out_metrics(trainer, [{"prompt": prompt} for prompt in PROMPTS])
    # Online pi_init's own responses are scored too, after the policy's of the same batch.
    own = seen if kind == "offline" else [*seen[:3], seen[6]]
    assert [prompt for prompt, _ in own] == PROMPTS and len(seen) == (4 if kind == "offline" else 8)
    kl, rewards = 0.0, [len(ids) + 0.1 * sum(ids) for _, ids in own]
    for prompt, ids in own:
        query = tiny_tokenizer()(prompt)["input_ids"]
        for model, sign in ((policy, 1), (ref_model, -1)):
            with torch.no_grad():
                logits = model(torch.tensor([[*query, *ids]])).logits[0, len(query) - 1 : -1] / 0.9
            kl += sign * float(logits.double().log_softmax(-1)[range(len(ids)), ids].sum()) / len(own)
    assert metrics["kl"] == pytest.approx(kl, abs=1e-5) and abs(kl) > 1e-3
    assert metrics["reward"] == pytest.approx(sum(rewards) / 4, rel=1e-6) == metrics["rewards/longer"]
    assert metrics["reward_std"] == pytest.approx(torch.tensor(rewards).std(unbiased=False).item(), rel=1e-5)
    assert metrics["reward_stderr"] == pytest.approx(torch.tensor(rewards).std().item() / 2, rel=1e-5)  # of four
    assert metrics["kl_stderr"] > 0 and ("win_rate_stderr" in metrics) == (kind == "online")
    assert metrics["response_length"] == pytest.approx(sum(len(ids) for _, ids in own) / 4)
    assert metrics["eos_share"] == pytest.approx(sum(ids[-1] == EOS for _, ids in own) / 4)
    texts = tiny_tokenizer().batch_decode([ids for _, ids in own], skip_special_tokens=True)
    assert [metrics[f"distinct_{n}"] for n in (1, 2)] == [distinct_ngrams(texts, n) for n in (1, 2)]


def test_a_standard_error_hand_worked():
    # 1, 2, 3, 6: mean 3, squared differences 4 + 1 + 0 + 9 = 14, variance 14 / 3, over 4 values 7 / 6
    assert standard_error(torch.tensor([1.0, 2.0, 3.0, 6.0])) == pytest.approx(math.sqrt(7 / 6))
    assert standard_error(torch.tensor([5.0])) == 0.0


def test_the_table_has_intervals_and_no_wins_of_the_reference_over_itself():
    metrics = {name: 0.5 for _, name, _ in COLUMNS} | {"reward_stderr": 0.1, "kl_stderr": 0.0, "win_rate_stderr": 0.25}
    without_wins = {name: value for name, value in metrics.items() if name not in WINS}
    heads, reference, other = table({"base": without_wins, "tuned": metrics}).splitlines()
    assert heads.split() == [heading for heading, _, _ in COLUMNS]
    assert "+0.500 ± 0.196" in reference and reference.split()[-1] == "-"
    assert other.endswith("0.500 ± 0.490") and "0.500 ± 0.000" in other
    assert len({len(line) for line in (heads, reference, other)}) == 1


@pytest.fixture
def evaluated(tmp_path, capsys, monkeypatch):
    """Runs the command on three prompts; returns its results, and what it says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_rewards.py").write_text(
        "def length(completions, **_):\n    return [float(len(c)) for c in completions]\n"
    )
    jsonl(tmp_path / "rows.jsonl", [{"prompt": f"What is {number}?"} for number in range(3)])
    make_model(tmp_path / "base")

    def evaluated(*argv):
        options = "--reward_funcs own_rewards.length --max_completion_length 4 --max_prompt_length 64 --use_cpu"
        capsys.readouterr()
        assert run("evaluate", "--dataset_name", "rows.jsonl", "--output", "out.json", *options.split(), *argv) == 0
        return json.loads((tmp_path / "out.json").read_text()), capsys.readouterr()

    return evaluated


def test_a_model_has_no_wins_over_itself_under_either_of_its_names(evaluated, tmp_path):
    """In the table and in the file; its other checkpoint has."""
    make_model(tmp_path / "other")
    names = ["base", "./base/", "other"]
    results, said = evaluated("--checkpoints", *names)
    rows = said.out.splitlines()[-3:]
    assert [row.split()[-1] == "-" for row in rows] == [True, True, False] and all("±" in row for row in rows)
    assert ["win_rate" in results[name] for name in names] == [False, False, True]


def test_a_quantised_model_is_measured_as_it_is(evaluated):
    """No adapters are needed where nothing is trained: those that its trainer gets add nothing."""
    pytest.importorskip("bitsandbytes")
    results, _ = evaluated("--checkpoints", "base", "--load_in_4bit")
    assert results["base"]["kl"] == 0
    plain, _ = evaluated("--checkpoints", "base")
    assert results["base"]["entropy"] != plain["base"]["entropy"]


def test_no_learning_rate_is_told_of_where_nothing_learns(evaluated, tmp_path):
    get_peft_model(AutoModelForCausalLM.from_pretrained("base"), lora_config()).save_pretrained("adapter")
    AutoTokenizer.from_pretrained("base").save_pretrained("adapter")
    results, said = evaluated("--checkpoints", "base", "adapter")
    assert results["adapter"]["kl"] == pytest.approx(0, abs=1e-4) and "learning_rate" not in said.err + said.out


def test_online_and_offline_measure_the_same_of_one_policy(tmp_path):
    policy, ref_model = tiny_model(scale=1.5), tiny_model(seed=1, scale=1.5)

    def sums(completion_ids, **columns):
        return [float(sum(ids)) for ids in completion_ids]

    # In one batch both draw the same random numbers: online pi_init is sampled after the policy.
    made = trainers(tmp_path, policy, ref_model, sums, per_device_eval_batch_size=len(PROMPTS))
    online, offline = (made[kind].evaluate() for kind in ("online", "offline"))
    for name in offline.keys() - {"eval_runtime", "epoch"}:
        assert offline[name] == pytest.approx(online[name], rel=1e-6), name
    assert {"eval_kl", "eval_reward", "eval_reward_std", "eval_rewards/sums", "eval_runtime"} <= offline.keys()


@pytest.mark.parametrize("kind", ["online", "offline"])
def test_a_failed_evaluation_leaves_modes_and_random_numbers_as_they_were(tmp_path, kind):
    def broken(completions, **columns):
        raise OSError("no judge")

    trainer = trainers(tmp_path, tiny_model(), None, broken, gradient_checkpointing=True)[kind]
    module = trainer.accelerator.unwrap_model(trainer.model)
    module.gradient_checkpointing_enable({"use_reentrant": False})
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="no judge"):
        trainer.evaluate()
    assert module.is_gradient_checkpointing and torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match="eval_dataset has no rows"):
        trainer.evaluate([])
