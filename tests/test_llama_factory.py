"""LLaMA-Factory's PPO stage on this package, with stand-ins for LLaMA-Factory's own argument classes and functions."""

import dataclasses
import importlib.util
import json
import math
import subprocess
import sys
import threading
import types
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    get_scheduler,
)

from tests.test_docs import fenced
from tests.tiny import lora_config, tiny_model, tiny_tokenizer
from trl_apa import AutoModelForCausalLMWithValueHead, PPOTrainer
from trl_apa.models.checkpointing import renamed_method


FOLDER = Path(__file__).resolve().parents[1] / "examples" / "llama_factory"
HEAD_NAMES = {"v_head.summary.weight", "v_head.summary.bias"}


def load_module(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ppo_trainer = load_module("ppo_trainer")
CustomPPOTrainer = ppo_trainer.CustomPPOTrainer


# ---- stand-ins: the fields of LLaMA-Factory's arguments that its PPO stage reads, with its defaults ----


@dataclasses.dataclass
class ModelArguments:
    model_name_or_path: str


@dataclasses.dataclass
class FinetuningArguments:
    finetuning_type: str = "lora"
    reward_model_type: str = "lora"
    reward_model: str | None = None
    ppo_buffer_size: int = 1
    ppo_epochs: int = 4
    ppo_score_norm: bool = False
    ppo_target: float = 6.0
    ppo_whiten_rewards: bool = False
    use_galore: bool = False
    use_apollo: bool = False
    use_badam: bool = False
    use_adam_mini: bool = False
    use_muon: bool = False
    galore_layerwise: bool = False
    apollo_layerwise: bool = False
    loraplus_lr_ratio: float | None = None


@dataclasses.dataclass
class GeneratingArguments:
    do_sample: bool = True
    temperature: float = 0.95
    top_p: float = 0.7
    top_k: int = 50
    num_beams: int = 1
    max_length: int = 1024
    max_new_tokens: int = 8
    repetition_penalty: float = 1.0
    length_penalty: float = 1.0
    skip_special_tokens: bool = True

    def to_dict(self):
        options = dataclasses.asdict(self)
        options.pop("max_length" if self.max_new_tokens > 0 else "max_new_tokens")
        return options


def save_reward_adapter(folder):
    """A LoRA reward model as LLaMA-Factory's stage `rm` leaves it: adapter and value head."""
    model = get_peft_model(tiny_model(), lora_config())
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    save_head(folder)


def save_head(folder):
    torch.manual_seed(4)
    head = {"v_head.summary.weight": torch.randn(1, 16), "v_head.summary.bias": torch.randn(1)}
    save_file(head, folder / ppo_trainer.VALUE_HEAD_FILE)


def load_with_head(model, folder=None):
    """What LLaMA-Factory's `load_model(add_valuehead=True)` does with a model and the head beside it."""
    wrapper = AutoModelForCausalLMWithValueHead.from_pretrained(model)
    if folder is not None:
        state = load_file(folder / ppo_trainer.VALUE_HEAD_FILE)
        assert state.keys() == HEAD_NAMES
        assert not wrapper.load_state_dict(state, strict=False).unexpected_keys
    return wrapper


def put_reward_adapter_on(model, folder):
    """What `create_reward_model` does for the type "lora"."""
    model.pretrained_model.load_adapter(folder, "reward")
    state = load_file(folder / ppo_trainer.VALUE_HEAD_FILE)
    for name in ("weight", "bias"):
        model.register_buffer(f"reward_head_{name}", state[f"v_head.summary.{name}"], persistent=False)
        zeros = torch.zeros_like(state[f"v_head.summary.{name}"])
        model.register_buffer(f"default_head_{name}", zeros, persistent=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The base, a reward model of all weights (`full`), and one that is an adapter (`lora`)."""
    root = tmp_path_factory.mktemp("models")
    tiny_model().save_pretrained(root / "base")
    tiny_model(seed=5).save_pretrained(root / "full")
    save_head(root / "full")
    save_reward_adapter(root / "lora")
    return root


@pytest.fixture
def server():
    """A reward server that answers as LLaMA-Factory's own; what it gives can be replaced."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, scores = served.answer(request["messages"])
            data = json.dumps({"id": "1", "object": "score.evaluation", "model": request["model"], "scores": scores})
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data.encode())

        def log_message(self, *args):
            pass

    served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.answer = lambda texts: (200, [score_of_text(text) for text in texts])
    served.url = f"http://127.0.0.1:{served.server_address[1]}/v1/score/evaluation"
    threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield served
    served.shutdown()
    served.server_close()


def score_of_text(text):
    """Of every word, its place among them counted too."""
    return math.sin(sum(place * sum(map(ord, word)) for place, word in enumerate(text.split(), 1)))


def prompts(rows=10):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 9, (rows,), generator=generator).tolist()
    ids = [torch.randint(2, 32, (length,), generator=generator).tolist() for length in lengths]
    return Dataset.from_list(
        [{"input_ids": i, "attention_mask": [1] * len(i), "labels": i, "images": []} for i in ids]
    )


def collator(tokenizer):
    """Pads on the left, where the tokenizer does, and reads a column that a decoder knows nothing of."""
    pad = DataCollatorForSeq2Seq(tokenizer)

    def collate(rows):
        assert all(row["images"] == [] for row in rows)
        return pad([{name: row[name] for name in row if name != "images"} for row in rows])

    return collate


def policy_of(finetuning_type):
    model = tiny_model()
    if finetuning_type == "lora":
        torch.manual_seed(1)
        return get_peft_model(model, lora_config())
    if finetuning_type == "freeze":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("layers.1." in name)
    return model


def make(
    tmp_path,
    folders,
    finetuning_type="full",
    reward_model_type="full",
    url=None,
    cls=CustomPPOTrainer,
    training=None,
    generating=None,
    changed=None,
    **finetuning,
):
    """The arguments that `run_ppo` makes, and the trainer that it makes of them."""
    training_args = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        **{"learning_rate": 1e-2, "logging_steps": 1, "save_steps": 2, "max_steps": 2, "report_to": "none"}
        | {"use_cpu": True, **(training or {})},
    )
    finetuning_args = FinetuningArguments(finetuning_type, reward_model_type, **{"ppo_epochs": 2, **finetuning})
    torch.manual_seed(2)
    model = load_with_head(policy_of(finetuning_type))
    reward_model = {"full": None, "api": url, "lora": None}[reward_model_type]
    if reward_model_type == "full":
        reward_model = load_with_head(tiny_model(seed=5), folders / "full").requires_grad_(False).eval()
    elif reward_model_type == "lora":
        put_reward_adapter_on(model, folders / "lora")
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "left"
    arguments = {
        "model_args": ModelArguments(str(folders / "base")),
        "training_args": training_args,
        "finetuning_args": finetuning_args,
        "generating_args": GeneratingArguments(**(generating or {})),
        "callbacks": None,
        "model": model,
        "reward_model": reward_model,
        "ref_model": None if finetuning_type == "lora" else load_with_head(tiny_model()),
        "data_collator": collator(tokenizer),
        "train_dataset": prompts(),
        "tokenizer": tokenizer,
        "processor": None,
    }
    return cls(**arguments | (changed or {}))


def run_stage(trainer):
    """What `run_ppo` calls."""
    trainer.ppo_train(resume_from_checkpoint=None)
    trainer.save_model()
    trainer.save_state()
    assert trainer.is_world_process_zero()


class Watched(CustomPPOTrainer):
    """Keeps what went into each step."""

    def step(self, queries, responses, scores):
        vars(self).setdefault("taken", []).append((queries, responses, scores))
        return super().step(queries, responses, scores)


def scores_one_by_one(folders, kind, sequences):
    """The reward model by plain transformers and peft, a sequence at a time."""
    if kind == "api":
        return [score_of_text(tiny_tokenizer().decode(sequence)) for sequence in sequences]
    model = AutoModelForCausalLM.from_pretrained(folders / ("full" if kind == "full" else "base"))
    if kind == "lora":
        model = PeftModel.from_pretrained(model, folders / "lora")
    head = load_file(folders / kind / ppo_trainer.VALUE_HEAD_FILE)
    scores = []
    for sequence in sequences:
        with torch.no_grad():
            hidden = model(input_ids=sequence[None], output_hidden_states=True).hidden_states[-1][0, -1]
        scores.append(float(head["v_head.summary.weight"][0] @ hidden + head["v_head.summary.bias"]))
    return scores


# ---- the stage ----


@pytest.mark.parametrize(
    ("finetuning_type", "reward_model_type"),
    [("full", "full"), ("freeze", "full"), ("lora", "lora"), ("lora", "full"), ("lora", "api"), ("full", "api")],
)
def test_the_stage_runs_and_leaves_what_the_other_stages_read(
    tmp_path, folders, server, finetuning_type, reward_model_type
):
    url = server.url if reward_model_type == "api" else None
    trainer = make(tmp_path, folders, finetuning_type, reward_model_type, url, Watched, ppo_buffer_size=2)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    run_stage(trainer)

    # Each score is that of its own query and response, and the queries are rows of the data set without padding.
    assert len(trainer.taken) == 2 and all(len(queries) == 8 for queries, *_ in trainer.taken)
    rows = Counter(map(tuple, prompts()["input_ids"]))
    for queries, responses, scores in trainer.taken:
        assert not Counter(tuple(query.tolist()) for query in queries) - rows
        sequences = [torch.cat(pair) for pair in zip(queries, responses, strict=True)]
        expected = torch.tensor(scores_one_by_one(folders, reward_model_type, sequences))
        torch.testing.assert_close(torch.stack(scores), expected, atol=1e-5, rtol=1e-5)
        assert expected.std() > 0.05

    # What should learn has learned, and nothing else: base, reward model and frozen layers are as they were.
    after = trainer.model.state_dict()
    learned = {name for name, tensor in after.items() if not tensor.equal(before[name])}
    assert {name for name in learned if "value_model" in name} == {name for name in after if "value_model" in name}
    of_policy = {name for name in learned if "value_model" not in name}
    part = {"full": "", "freeze": "layers.1.", "lora": ".default."}[finetuning_type]
    assert of_policy and all(part in name for name in of_policy)
    if finetuning_type == "lora":
        assert of_policy == {name for name in after if ".default." in name}

    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        assert_can_be_read(folder, trainer, finetuning_type)
    assert not (tmp_path / "checkpoint-1").exists()
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert [(logs["step"], logs["epoch"]) for logs in history] == [(1, 1.0), (2, 2.0)]
    rewards = [float(torch.stack(scores).mean()) for *_, scores in trainer.taken]
    assert [logs["reward"] for logs in history] == pytest.approx(rewards)
    assert all(math.isfinite(logs["loss"]) for logs in history)


def assert_can_be_read(folder, trainer, finetuning_type):
    """Plain transformers, or peft, reads the policy, and `load_model(add_valuehead=True)` its head."""
    saved = {path.name for path in folder.iterdir()}
    if finetuning_type == "lora":
        assert "reward" not in saved and "model.safetensors" not in saved
        loaded = PeftModel.from_pretrained(tiny_model(), folder)
        assert list(loaded.peft_config) == ["default"]
    else:
        loaded = AutoModelForCausalLM.from_pretrained(folder)
    wrapper = load_with_head(loaded, folder).eval()
    ids = torch.tensor([[5, 9, 3, 7]])
    with torch.no_grad():
        logits, _, values = wrapper(input_ids=ids)
        now_logits, _, now_values = trainer.model(input_ids=ids)
    torch.testing.assert_close(logits, now_logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(values, now_values, atol=1e-5, rtol=1e-5)


def test_an_update_is_that_of_ppo_trainer_with_these_options(tmp_path, folders):
    """The same rollouts in a plain `PPOTrainer` end with the same weights."""
    options = {"ppo_buffer_size": 2, "ppo_epochs": 3, "ppo_target": 3.0, "ppo_score_norm": True}
    training = {"max_grad_norm": 0.5, "weight_decay": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 1}
    training |= {"max_steps": 4}
    trainer = make(tmp_path, folders, cls=Watched, training=training, **options, ppo_whiten_rewards=True)
    trainer.ppo_train()

    torch.manual_seed(2)
    config = ppo_trainer.PPOConfig(
        output_dir=str(tmp_path / "plain"),
        use_cpu=True,
        bf16=False,
        batch_size=8,
        mini_batch_size=2,
        gradient_accumulation_steps=2,
        ppo_epochs=3,
        target=3.0,
        use_score_scaling=True,
        use_score_norm=True,
        whiten_rewards=True,
        temperature=0.95,
        learning_rate=1e-2,
        weight_decay=0.1,
        max_grad_norm=0.5,
        lr_scheduler_type="cosine",
        warmup_steps=1,
        steps=32,
        seed=42,
    )
    plain = PPOTrainer(config, load_with_head(tiny_model()), load_with_head(tiny_model()), tiny_tokenizer())
    plain.model.load_state_dict(make(tmp_path, folders).model.state_dict())
    for rollouts in trainer.taken:
        plain.step(*rollouts)
    for name, tensor in plain.model.state_dict().items():
        torch.testing.assert_close(trainer.model.state_dict()[name], tensor, atol=1e-5, rtol=1e-4)

    # The schedule goes over iterations, not over optimizer steps.
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-2)
    schedule, rates = get_scheduler("cosine", optimizer, 1, 4), []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert [logs["learning_rate"] for logs in trainer.ppo_state.log_history] == pytest.approx(rates)


@pytest.mark.parametrize("loss_type", ["apa", "awr"])
def test_another_loss_trains_the_same_head(tmp_path, folders, monkeypatch, loss_type):
    monkeypatch.setenv("TRL_APA_OPTIONS", json.dumps({"loss_type": loss_type, "kl_coef": 0.5, "vf_coef": 0.25}))
    trainer = make(tmp_path, folders, "lora", "lora", training={"max_steps": 1})
    args = trainer.args
    assert (args.loss_type, args.kl_coef, args.vf_coef, args.ppo_epochs) == (loss_type, 0.5, 0.25, 2)
    before = {name: tensor.clone() for name, tensor in trainer.model.v_head.state_dict().items()}
    run_stage(trainer)
    assert all(not tensor.equal(before[name]) for name, tensor in trainer.model.v_head.state_dict().items())
    assert_can_be_read(tmp_path, trainer, "lora")


@pytest.mark.parametrize(
    ("training", "rows", "steps"),
    [({"max_steps": 5}, 10, 5), ({"num_train_epochs": 3.0}, 10, 6), ({"num_train_epochs": 1.4}, 10, 3)],
)
def test_how_many_iterations_a_run_has(tmp_path, folders, training, rows, steps):
    training = {"max_steps": -1, **training}
    args = Seq2SeqTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **training)
    assert ppo_trainer.ppo_steps(args, 4, rows) == steps


class Told(TrainerCallback):
    """Keeps what callbacks are told, and stops after `last` iterations."""

    def __init__(self, last=99):
        self.events, self.last = [], last

    def heard(self, name, args, state, control, logs=None, model=None, **kwargs):
        self.args, self.model = args, model
        self.events.append((name, state.global_step, sorted(logs or {})))
        control.should_training_stop |= name == "step_end" and state.global_step >= self.last

    def on_train_begin(self, *given, **kwargs):
        self.heard("train_begin", *given, **kwargs)

    def on_step_end(self, *given, **kwargs):
        self.heard("step_end", *given, **kwargs)

    def on_log(self, *given, **kwargs):
        self.heard("log", *given, **kwargs)

    def on_save(self, *given, **kwargs):
        self.heard("save", *given, **kwargs)

    def on_train_end(self, *given, **kwargs):
        self.heard("train_end", *given, **kwargs)


def test_callbacks_are_told_of_iterations(tmp_path, folders):
    told = Told(last=3)
    trainer = make(tmp_path, folders, training={"max_steps": 9, "logging_steps": 3}, changed={"callbacks": [told]})
    trainer.ppo_train()
    logged = ["epoch", "learning_rate", "loss", "reward"]
    assert told.events == [
        ("train_begin", 0, []),
        ("step_end", 1, []),
        ("step_end", 2, []),
        ("save", 2, []),
        ("step_end", 3, []),
        ("log", 3, logged),
        ("train_end", 3, []),
    ]
    assert told.args is trainer.training_args and isinstance(told.model, AutoModelForCausalLMWithValueHead)


def test_logs_are_means_and_trackers_get_all_statistics(tmp_path, folders):
    sent = []
    training = {"max_steps": 2, "logging_steps": 2, "report_to": "tensorboard"}
    trainer = make(tmp_path, folders, cls=Watched, training=training)
    trainer.log_stats = lambda stats, texts, rewards: sent.append((stats, texts, rewards))
    trainer.ppo_train()
    ((stats, texts, rewards),) = sent
    means = [float(torch.stack(scores).mean()) for *_, scores in trainer.taken]
    assert stats["reward"] == pytest.approx(sum(means) / 2)
    assert stats.keys() > {"ppo/loss/total", "objective/kl", "loss", "epoch"}
    queries, responses, scores = trainer.taken[-1]
    assert rewards == scores
    assert texts["query"] == [trainer.tokenizer.decode(query) for query in queries]
    assert len(texts["response"]) == len(responses)


def test_sampling_follows_generating_args(tmp_path, folders):
    generating = {"max_new_tokens": 5, "temperature": 0.5, "top_p": 0.9, "top_k": 7}
    trainer = make(tmp_path, folders, generating=generating)
    assert (trainer.args.temperature, trainer.args.top_p, trainer.args.top_k) == (0.5, 0.9, 7)
    greedy = make(tmp_path, folders, generating={"do_sample": False, "max_new_tokens": 5})
    batch = next(iter(greedy.dataloader))
    queries, responses = greedy.get_inputs(batch)
    model = tiny_model()
    for query, response in zip(queries, responses, strict=True):
        expected = model.generate(query[None], max_new_tokens=5, do_sample=False, eos_token_id=1, pad_token_id=0)
        assert response.tolist() == expected[0, len(query) :].tolist()


def test_stop_words_of_a_template_end_a_response(tmp_path, folders):
    """LLaMA-Factory's templates add them to the tokenizer as special tokens."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["w7", "w9"]})
    options = ppo_trainer.sampling_options(GeneratingArguments(), tokenizer)
    assert options["eos_token_id"] == [1, 7, 9]
    assert "skip_special_tokens" not in options and "max_length" not in options
    assert ppo_trainer.sampling_options(GeneratingArguments(max_new_tokens=0), tokenizer)["max_length"] == 1024


# ---- LLaMA-Factory's own switches ----


def test_its_gradient_checkpointing_is_taken_over(tmp_path, folders):
    """LLaMA-Factory patches the method of the model with one that takes fewer arguments than transformers gives it."""

    def patched(self, gradient_checkpointing_kwargs=None):
        raise AssertionError("the patched method was called")

    plain = make(tmp_path / "plain", folders, training={"max_steps": 1})
    plain.ppo_train()
    torch.manual_seed(2)
    model = load_with_head(tiny_model())
    base = model.pretrained_model
    renamed_method(base, "activation_checkpointing_enable", "gradient_checkpointing_enable")({"use_reentrant": True})
    base.gradient_checkpointing_enable = types.MethodType(patched, base)
    checkpointed = make(tmp_path, folders, training={"max_steps": 1}, changed={"model": model})
    checkpointed.ppo_train()
    assert checkpointed.model.is_gradient_checkpointing and not plain.model.is_gradient_checkpointing
    for name, tensor in plain.model.state_dict().items():
        torch.testing.assert_close(checkpointed.model.state_dict()[name], tensor, atol=1e-5, rtol=1e-4)


def test_its_own_optimizer_is_used_if_asked_for(tmp_path, folders, monkeypatch):
    """LoRA+: the B matrices learn faster."""
    asked = []

    def create_custom_optimizer(model, training_args, finetuning_args):
        asked.append((training_args.learning_rate, finetuning_args.loraplus_lr_ratio))
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        fast = [p for name, p in named if "lora_B" in name]
        slow = [p for name, p in named if "lora_B" not in name]
        rate = training_args.learning_rate
        return torch.optim.SGD([{"params": slow}, {"params": fast, "lr": 4 * rate}], lr=rate)

    utils = types.ModuleType("llamafactory.train.trainer_utils")
    utils.create_custom_optimizer = create_custom_optimizer
    for name in ("llamafactory", "llamafactory.train"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, utils.__name__, utils)
    trainer = make(tmp_path, folders, "lora", "lora", training={"max_steps": 1}, loraplus_lr_ratio=4.0)
    trainer.ppo_train()
    assert asked == [(1e-2, 4.0)]
    assert [group["lr"] for group in trainer.optimizer.param_groups][:2] == [0.0, 0.0]  # linear, at its end
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in trainer.model.parameters() if p.requires_grad}


def test_a_processor_is_saved_beside_the_model(tmp_path, folders):
    processor = types.SimpleNamespace(save_pretrained=lambda folder: (Path(folder) / "processor.txt").touch())
    trainer = make(tmp_path, folders, changed={"processor": processor})
    trainer.save_model(str(tmp_path / "checkpoint-1"))
    assert (tmp_path / "checkpoint-1" / "processor.txt").exists()


def test_it_replaces_no_more_of_the_trainer_than_it_means_to():
    """Methods of the package that it overrides; any other name in common would break the trainer without a word."""
    own = {name for name in vars(CustomPPOTrainer) if not name.startswith("__")}
    assert {name for name in own if hasattr(PPOTrainer, name)} == {"_save", "save_state"}


# ---- mistakes ----


@pytest.mark.parametrize(
    ("changed", "finetuning", "message"),
    [
        ({"eval_dataset": [1]}, {}, "eval_dataset: the PPO stage does not evaluate"),
        ({"train_dataset": iter([])}, {}, "train_dataset has no length: set streaming to false"),
        ({"train_dataset": prompts(3)}, {}, "train_dataset has 3 rows, and one iteration takes 4"),
        ({}, {"use_badam": True}, "use_badam is not supported"),
        ({}, {"galore_layerwise": True}, "galore_layerwise is not supported"),
        ({"reward_model": None}, {}, "reward_model is a NoneType; with reward_model_type='full'"),
        ({"reward_model": "http://x"}, {}, "reward_model is a str; with reward_model_type='full'"),
        ({"reward_model": None}, {"reward_model_type": "api"}, "reward_model is a NoneType; .* it should be str"),
        ({"reward_model": None}, {"reward_model_type": "lora"}, "needs an adapter 'reward' on model"),
        ({"model": tiny_model()}, {}, "model is a LlamaForCausalLM"),
    ],
)
def test_mistakes_are_named_before_the_run(tmp_path, folders, changed, finetuning, message):
    finetuning_args = FinetuningArguments(**{"finetuning_type": "full", "reward_model_type": "full", **finetuning})
    with pytest.raises(ValueError, match=message):
        make(tmp_path, folders, changed={"finetuning_args": finetuning_args, **changed})


def test_resuming_is_refused(tmp_path, folders):
    with pytest.raises(ValueError, match="checkpoints of the PPO stage hold no optimizer"):
        make(tmp_path, folders).ppo_train("checkpoint-1")


def test_a_reward_server_that_fails_ends_the_run_with_its_reason(tmp_path, folders, server):
    trainer = make(tmp_path, folders, "lora", "api", server.url)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    for answer, error, message in [
        ((500, []), RuntimeError, "gave no scores: 500"),
        ((200, [0.5]), ValueError, "answered 2 texts with 1 scores"),
        ((200, None), ValueError, "answered 2 texts with scores=None"),
        ((200, [0.5, float("nan")]), ValueError, "scores"),
    ]:
        server.answer = lambda texts, answer=answer: answer
        with pytest.raises(error, match=message):
            trainer.ppo_train()
    assert all(tensor.equal(before[name]) for name, tensor in trainer.model.state_dict().items())


def test_a_password_in_the_address_of_a_server_is_not_shown():
    with pytest.raises(RuntimeError) as caught:
        ppo_trainer.scores_of_server("http://user:hunter2secret@127.0.0.1:9/score", ["text"])
    assert "127.0.0.1" in str(caught.value) and "hunter2secret" not in str(caught.value)


# ---- the launcher ----


def test_the_launcher_puts_the_trainer_in_the_place_of_theirs(tmp_path, monkeypatch):
    """A package with LLaMA-Factory's layout, whose own trainer cannot be imported."""
    package = tmp_path / "llamafactory" / "train"
    (package / "ppo").mkdir(parents=True)
    for folder in (tmp_path / "llamafactory", package):
        (folder / "__init__.py").touch()
    (package / "ppo" / "__init__.py").write_text("from .workflow import run_ppo\n")
    (package / "ppo" / "trainer.py").write_text("raise ImportError('theirs')\n")
    (package / "callbacks.py").write_text("def fix_valuehead_checkpoint(*args):\n    raise OSError('no such file')\n")
    (package / "ppo" / "workflow.py").write_text(
        "from ..callbacks import fix_valuehead_checkpoint\n"
        "from .trainer import CustomPPOTrainer\n\n"
        "def run_ppo():\n"
        "    fix_valuehead_checkpoint('model', 'folder', True)\n"
        "    return CustomPPOTrainer\n"
    )
    (package / "tuner.py").write_text(
        "from .ppo import run_ppo\n\nran = []\n\ndef run_exp():\n    ran.append(run_ppo())\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "ppo_trainer", ppo_trainer)
    monkeypatch.delenv("DISABLE_VERSION_CHECK", raising=False)
    known = set(sys.modules)
    launcher, installed = load_module("train"), []
    launcher.install = lambda: installed.append("llamafactory.train.ppo" in sys.modules)
    try:
        launcher.main()
        assert sys.modules["llamafactory.train.tuner"].ran == [CustomPPOTrainer]
    finally:
        for name in set(sys.modules) - known:
            if name.partition(".")[0] == "llamafactory":
                del sys.modules[name]
        launcher.os.environ.pop("DISABLE_VERSION_CHECK", None)
    assert installed == [False]  # before LLaMA-Factory imports anything from TRL


def test_the_commands_of_the_page_change_a_checkout(tmp_path):
    """In files with the lines that they look for, and others beside them."""
    root = tmp_path / "LLaMA-Factory"
    package = root / "src" / "llamafactory"
    for folder in ("model", "train/ppo"):
        (package / folder).mkdir(parents=True)
    with_import = "from peft import PeftModel\nfrom trl import AutoModelForCausalLMWithValueHead\n"
    for name in ("model/loader.py", "train/test_utils.py"):
        (package / name).write_text(with_import)
    for name in ("trainer", "ppo_utils"):
        (package / "train" / "ppo" / f"{name}.py").write_text("theirs = True\n")
    (package / "train" / "ppo" / "workflow.py").write_text(
        "from ..callbacks import fix_valuehead_checkpoint\n"
        "from .trainer import CustomPPOTrainer\n\n\n"
        "def run_ppo(training_args, model):\n"
        "    if training_args.do_train:\n"
        "        CustomPPOTrainer.save_model()\n"
        "        if training_args.should_save:\n"
        "            fix_valuehead_checkpoint(model, training_args.output_dir, True)\n\n"
        "        CustomPPOTrainer.save_state()\n"
    )
    (tmp_path / "trl_apa").symlink_to(FOLDER.parents[1])
    (commands,) = [
        block for block in fenced(FOLDER.parents[1] / "docs" / "llama_factory.md", "text") if "sed" in block
    ]
    assert len(commands.splitlines()) == 5
    subprocess.run(["bash", "-e"], input=commands, text=True, cwd=root, check=True)
    for name in ("model/loader.py", "train/test_utils.py"):
        assert (package / name).read_text() == with_import.replace("from trl ", "from trl_apa ")
    assert {path.name for path in (package / "train" / "ppo").iterdir()} == {"trainer.py", "workflow.py"}
    assert (package / "train" / "ppo" / "trainer.py").read_text() == (FOLDER / "ppo_trainer.py").read_text()
    assert (package / "train" / "ppo" / "workflow.py").read_text() == (
        "from .trainer import CustomPPOTrainer\n\n\n"
        "def run_ppo(training_args, model):\n"
        "    if training_args.do_train:\n"
        "        CustomPPOTrainer.save_model()\n\n"
        "        CustomPPOTrainer.save_state()\n"
    )
