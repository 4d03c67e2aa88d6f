"""Tokenizers of every kind that policies and reward models come with, made on the spot."""

from functools import lru_cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast


SPECIAL = ["<pad>", "</s>", "<s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>"]
TEXTS = [
    "the cat END the dog\n\nHuman: stop it Human:\n a café , END.END and the hENDen 👍 ok user assistant system",
    "\n\nAssistant: endless stopper laster topper. STOP! What is it? It is so.",
    "un café noir \n \n\n x",
] * 4


def byte_level():
    """As of GPT-2, Llama 3, Qwen: any text in bytes, the space before a word in its token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"vocab_size": 400, "special_tokens": SPECIAL, "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(**options))
    return tokenizer


def sentencepiece():
    """As of Llama 2, Mistral, Gemma: a space is a letter, what is unknown is spelled in bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    pieces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(pieces)
    special = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    options = {"vocab_size": 420, "special_tokens": special, "show_progress": False}
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(**options))
    return tokenizer


def unigram():
    """As of T5: no token for what was not seen."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    options = {"vocab_size": 120, "special_tokens": SPECIAL, "unk_token": "<unk>", "show_progress": False}
    tokenizer.train_from_iterator(TEXTS, trainers.UnigramTrainer(**options))
    return tokenizer


def wordpiece():
    """As of BERT."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    options = {"vocab_size": 150, "special_tokens": SPECIAL, "show_progress": False}
    tokenizer.train_from_iterator(TEXTS, trainers.WordPieceTrainer(**options))
    return tokenizer


def words():
    """A word a token."""
    known = dict.fromkeys(word for text in TEXTS for word in text.split())
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate([*SPECIAL, *known])}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


KINDS = {make.__name__: make for make in (byte_level, sentencepiece, unigram, wordpiece, words)}


@lru_cache
def _trained(kind):
    return KINDS[kind]().to_str()


def made_tokenizer(kind, around="$A", chat_template=None, **options):
    """A tokenizer of a kind.

    Args:
        kind: of `KINDS`, or "byt5", which is written in Python and appends EOS by itself.
        around: what it puts around a text, "<s> $A </s>" say.
        chat_template: Jinja.
        options: of the tokenizer.
    """
    if kind == "byt5":
        tokenizer = ByT5Tokenizer()
    else:
        inside = Tokenizer.from_str(_trained(kind))
        added = [(token, i) for i, token in enumerate(SPECIAL) if token in around]
        inside.post_processor = TemplateProcessing(single=around, special_tokens=added)
        names = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
        more = {"additional_special_tokens": SPECIAL[4:]}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=inside, **{**names, **more, **options})
    tokenizer.chat_template = chat_template
    return tokenizer


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROLES = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
BRACKETS = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }} {{ eos_token }}{% endif %}"
    "{% endfor %}"
)
HEADINGS = (
    "{% for m in messages %}### {{ m.role }}:\n{{ m.content | trim }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)
CHAT_TEMPLATES = {
    "chatml": CHATML,
    "chatml, bos": f"{{{{ bos_token }}}}{CHATML}",
    "chatml, system": "{% if messages[0].role != 'system' %}<|im_start|>system\nSo.<|im_end|>\n{% endif %}" + CHATML,
    "roles": ROLES,
    "roles, bos": f"{{{{ bos_token }}}}{ROLES}",
    "brackets": BRACKETS,
    "brackets, bos": f"{{{{ bos_token }}}}{BRACKETS}",
    "headings": HEADINGS,
    "headings, bos": f"\n{{{{ bos_token }}}} {HEADINGS}",
}
