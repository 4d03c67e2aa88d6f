"""Models and data for a small run of every example without network: `python examples/tiny_inputs.py tiny`.

The models have a few thousand weights, random but for the sentiment classifier, which is trained on the spot. What
they write means nothing; the runs show that the scripts work.
"""

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import WordLevelTrainer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5Config,
    set_seed,
)


PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"
GOOD = "great superb lovely moving funny clever charming brilliant".split()
BAD = "awful dull terrible boring clumsy stupid weak tedious".split()
PARTS = "film plot music ending cast dialogue camera story".split()
TASKS = "sort a list, close a very large file, parse dates, join two tables, draw, test a function".split(", ")
TOOLS = "python bash sql latex".split()
NUM_ROWS = 64


def reviews() -> Iterator[dict]:
    """Film reviews in the columns of `stanfordnlp/imdb`."""
    for number in range(NUM_ROWS):
        label = number % 2
        sentences = [f"the {random.choice(PARTS)} was {random.choice(GOOD if label else BAD)} ." for _ in range(12)]
        yield {"text": " ".join(sentences), "label": label}


def questions() -> Iterator[dict]:
    """Questions with a better and a worse answer, in the columns of `lvwerra/stack-exchange-paired`."""
    for _ in range(NUM_ROWS):
        task, tool = random.choice(TASKS), random.choice(TOOLS)
        good, bad = f"use {tool} to {task} .", "that is a dull question ."
        yield {"question": f"how do I {task} in {tool} ?", "response_j": good, "response_k": bad}


def chats() -> Iterator[dict]:
    """Dialogues in the columns of `Anthropic/hh-rlhf`."""
    for row in questions():
        start = f"\n\nHuman: {row['question']}\n\nAssistant:"
        yield {"chosen": f"{start} {row['response_j']}", "rejected": f"{start} {row['response_k']}"}


def dialogues() -> Iterator[dict]:
    """Conversations and their summaries, in the columns of `knkarthick/dialogsum`."""
    for row in questions():
        dialogue = f"#Person1#: {row['question']}\n#Person2#: {row['response_j']}"
        yield {"dialogue": dialogue, "summary": f"#Person1# asks how to {row['response_j'].partition(' to ')[2]}"}


def build_tokenizer(texts: list[str], **special_tokens: str) -> PreTrainedTokenizerBase:
    """One token a word of `texts`, with the space before it as GPT-2's have; in the same order every time."""
    tokenizer = Tokenizer(WordLevel(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.train_from_iterator(texts, WordLevelTrainer(special_tokens=[PAD, EOS, UNKNOWN], show_progress=False))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        eos_token=EOS,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=128,
        **special_tokens,
    )


def train_classifier(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict]) -> None:
    """Teach `model` the labels of pieces of the reviews."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(100):
        batch = random.choices(rows, k=16)
        starts = [random.randrange(40) for _ in batch]
        pieces = [" ".join(row["text"].split()[s : s + 15]) for row, s in zip(batch, starts, strict=True)]
        inputs = tokenizer(pieces, padding=True, return_tensors="pt")
        model(**inputs, labels=torch.tensor([row["label"] for row in batch])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def save(folder: Path, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_models(folder: Path, texts: list[str], labelled: list[dict]) -> None:
    tokenizer = build_tokenizer(texts, pad_token=PAD)
    ids = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    gpt2 = GPT2Config(**ids, n_embd=32, n_layer=2, n_head=2, n_positions=128)
    save(folder / "gpt2", AutoModelForCausalLM.from_config(gpt2), tokenizer)

    names = {"id2label": {0: "NEGATIVE", 1: "POSITIVE"}, "label2id": {"NEGATIVE": 0, "POSITIVE": 1}}
    distilbert = DistilBertConfig(
        vocab_size=len(tokenizer), pad_token_id=0, dim=32, hidden_dim=64, n_layers=1, n_heads=2, **names
    )
    classifier = AutoModelForSequenceClassification.from_config(distilbert)
    train_classifier(classifier, tokenizer, labelled)
    save(folder / "sentiment", classifier, tokenizer)

    llama = LlamaConfig(
        **ids,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    # Like the tokenizers of Llama models, this one names no padding token.
    llama_tokenizer = build_tokenizer(texts)
    save(folder / "llama", AutoModelForCausalLM.from_config(llama), llama_tokenizer)
    llama.num_labels = 1
    save(folder / "reward_model", AutoModelForSequenceClassification.from_config(llama), llama_tokenizer)
    make_reward_adapter(folder)

    t5 = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, 1)])
    save(folder / "t5", AutoModelForSeq2SeqLM.from_config(t5), tokenizer)


def make_reward_adapter(folder: Path) -> None:
    """A reward model as a LoRA adapter on `llama`: what training with `task_type="SEQ_CLS"` leaves."""
    classifier = AutoModelForSequenceClassification.from_pretrained(folder / "llama", num_labels=2)
    # Not as LoRA starts, which changes nothing, but as training leaves it.
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS", init_lora_weights=False)
    get_peft_model(classifier, lora).save_pretrained(folder / "reward_adapter")


def main(folder: Path) -> None:
    """Write all of it into `folder`; the same every time."""
    set_seed(0)
    tables = {make.__name__: list(make()) for make in (reviews, questions, chats, dialogues)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [text for rows in tables.values() for row in rows for text in row.values() if isinstance(text, str)]
    # The words that the scripts put around a question and a conversation.
    texts += ["Question: how\n\nAnswer: ", "Summarize the following conversation.\n\n#Person1#\n\nSummary:"]
    make_models(folder, texts, tables["reviews"])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} FOLDER")
    main(Path(sys.argv[1]))
