"""Patterns of keys, tokens and passwords: by name, and in texts."""

import base64
import binascii
import html
import itertools
import json
import re
from collections.abc import Collection
from urllib.parse import quote


HIDDEN = "<secret>"

# The rule for names. A name is split into words: `x-api-key-header`, `hfToken`, `WANDB_API_KEY`.
# It is a secret's if one of these is among its words,
SECRET_WORDS = frozenset(
    "auth oauth oauth2 authorization authentication bearer cookie cookies cred creds credential credentials dsn hmac "
    "jwt otp pass passcode passphrase passwd password passwords pat psw pw pwd sas secret secrets session "
    "sessions sig signature signatures webhook webhooks".split()
)
# if one of these is in it, words run together,
SECRET_STEM = re.compile(
    r"password|passwd|pass(?:code|key|phrase)|(?:admin|db|root|smtp|user)pass|secret(?!ar)|credential|sess(?:ion)?id|"
    r"(?:access|account|api|auth|encryption|license|master|private|secret|service|shared|signing|ssh|storage)keys?"
)
# or if one of its words ends in `token` or `key`, `hfkey`, and none is one that tokenizers and networks use:
# `pad_token`, `max_new_tokens`, `key_padding`.
OPEN_WORD = re.compile(r"(?!(?:don|hoc|joc|mon|tur|whis)key).*(?:key|token)s?")
HARMLESS_WORDS = frozenset(
    "additional bos cls eos error forced ignore mask max min num pad padding per seen sep sort special stop total unk "
    "vocab".split()
)
WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")


def is_secret_name(name: str) -> bool:
    """Whether a value with this name is secret, unless it is a number, True, False or None."""
    words = _words(name)
    return is_surely_secret_name(name) or (any(map(OPEN_WORD.fullmatch, words)) and HARMLESS_WORDS.isdisjoint(words))


def is_surely_secret_name(name: str) -> bool:
    """Whether even a number of this name is a secret where numbers are texts: `password`, not `token`."""
    words = _words(name)
    return not SECRET_WORDS.isdisjoint(words) or bool(SECRET_STEM.search("".join(words)))


def is_harmless_under(name: str, text: str) -> bool:
    """Whether a text is no secret although its name is one's: empty, hidden already, or a special token, `<s>`."""
    is_special_token = re.fullmatch(r"<[^<>\s]{1,40}>", text) and not is_surely_secret_name(name)
    return text in ("", HIDDEN) or bool(is_special_token)


def is_harmless_in_text(name: str, text: str) -> bool:
    """The same of what a text or a command line has under a name, where numbers, True and None are texts."""
    if is_harmless_under(name, text) or NO_SECRET.fullmatch(text):
        return True
    return bool(NUMBERS.fullmatch(text)) and not is_surely_secret_name(name)


def note_secret(secret: str, found: set[str]) -> None:
    """Add a secret, and parts of it that are one by themselves: `user:abc`, `Bearer abc`, `theme=dark; sid=abc`."""
    if HIDDEN in secret:
        return
    parts = re.split(r"[\s:=;,&/\"'<>()\[\]{}]+", secret)
    found |= {secret} | {part for part in parts if len(part) >= 8 and re.search("[0-9]", part) and not part.isdigit()}
    if not re.search(r"\s", secret) and ":" in secret:
        found.add(secret.partition(":")[2])


def _words(name: str) -> list[str]:
    return [word.lower() for word in WORD.findall(name.replace(HIDDEN, ""))]


# ---- texts ----

# What stands between a name and its value: `name=`, `"name": `, `\"name\": `, `["name"] = `, `name => `.
SIGN = r"\\*[\"'`]?\]?\s*(?:=>|:=|={1,2}|:)[ \t]*"
# A value: in quotes, in the quotes of a text that is quoted itself, or a word. `_value_at` sees to brackets.
VALUE = re.compile(
    r"[bruf]{0,2}(?P<quote>[\"'`])(?P<quoted>(?:\\.|(?!(?P=quote))[^\\\n])+)"
    r"|(?P<escape>\\+)(?P<inner>[\"'])(?P<escaped>(?:(?!(?P=escape)(?P=inner)).)+)"
    r"|(?P<word>[^\s\"'`\\,;&]+)"
)
# A value on separate lines below its name: they are indented or a list.
LINE = r"(?:[ \t]+|[ \t]*-[ \t]+)\S.*"
BLOCK = re.compile(rf"(?:[>|][+-]?[0-9]?)?[ \t]*\n{LINE}(?:\n{LINE})*")
# What opens a value that is hidden if `name` is a secret's.
NAMED = (
    re.compile(rf"(?<![\w.-])-{{0,2}}(?P<name>[A-Za-z_][\w.-]*){SIGN}"),
    re.compile(r"(?<![\w-])(?P<name>--?[A-Za-z][\w-]*)(?:\\*[\"'`],)?\s+(?!-)"),
    re.compile(r"<(?!secret>)(?P<name>[A-Za-z][\w:.-]*)>"),
)
# `API key provided: abc`, `the password 'abc' is wrong`, `("x-api-key", "abc")`, `"x-api-key", "value": "abc"`.
PHRASES = (
    re.compile(
        r"\b(?:(?:access|api|auth|bot|hub|private|secret|user)[ _-]?(?:keys?|tokens?)|passwords?|passphrase|secrets?"
        r"|credentials?|signature)(?: (?:provided|given|supplied|received|used|sent|was|is))*(?:\s*:\s*| (?=[\"'`]))"
        r"|\b(?:keys?|tokens?)(?: (?:provided|given|supplied|received|used|sent|was|is))+\s*:\s*"
        r"|\btokens? (?=[\"'`])"
        r"|\b(?:keys?|passwords?|secrets?|tokens?) (?=[\w.-]*[0-9])(?=[\w.-]*[A-Za-z])(?=[\w.-]{8})",
        re.IGNORECASE,
    ),
    re.compile(
        r"[\"'](?:(?:proxy-)?authorization|(?:set-)?cookie|(?:x-)?api[-_]?key|password|secret)[\"']\s*,\s*"
        r"(?:[\"']value[\"']\s*:\s*)?(?=b?[\"'])(?![\"']\w+[\"']\s*:)",
        re.IGNORECASE,
    ),
)
SCHEME = "(?:apikey|aws4-hmac-sha256|basic|bearer|digest|key|negotiate|token)"
QUOTE = r"[\[({]?\\*[\"'`]?"
SECRETS = (
    re.compile(r"\bbearer[\s:=]+\\*[\"'`]?(?P<secret>[^\s\"'`\\,;]+)", re.IGNORECASE),
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?P<secret>.+?)(?:-----END|$)", re.DOTALL),
    # The user of an address, up to the last @; a password may hold a slash, but what follows a port is a path.
    re.compile(
        r"(?<=//)(?P<secret>[^\s/?#\"'<>]{1,400}|[^\s/?#:\"'<>]{0,200}:(?!\d+[/?#])[^\s\"'<>]{1,400})@(?=[\w\[])"
    ),
    re.compile(r"(?<![\w/:@.+%-])(?P<secret>(?!mailto:)[\w.+%-]+:[^\s@/\"'<>:]+)@(?=[\w\[])"),
    re.compile(r"(?<!\S)(?:-u|--user|--proxy-user)[ =][\"']?(?P<secret>[^\s\"']+:[^\s\"']+)"),
    re.compile(
        rf"\b(?:proxy-)?authorization{SIGN}{QUOTE}(?P<secret>digest [^\n]+|(?:{SCHEME}\s+)?[^\s\"'`,\\]+)",
        re.IGNORECASE,
    ),
    re.compile(rf"\b(?:set-)?cookies?{SIGN}{QUOTE}(?P<secret>[^\n\r\"'`\\]+)", re.IGNORECASE),
)
BASIC = re.compile(r"\bbasic\s+(?P<secret>[A-Za-z0-9+/_-]{4,}={0,2})", re.IGNORECASE)
QUERY = re.compile(r"(?<=[\w/)\]])[?#](?P<query>[^\s\"'<>?#]*=[^\s\"'<>?#]*)")
PARAMETER = re.compile(r"(?P<name>[^&;=]+)=(?P<secret>[^&;]+)")
# Key formats of services that publish theirs, addresses that are keys, and keys of which a server shows the ends.
KEY_FORMATS = (
    re.compile(
        r"(?<![A-Za-z0-9])(?P<secret>sk-[\w*•….-]{6,}|[sr]k_(?:live|test)_\w{8,}"
        r"|(?:sk-|hf_|gh[pousr]_|xox[a-z]-)[\w-]*(?:\*+|•+|…|\.{3})[\w*•….-]*"
        r"|hf_(?:(?=[a-z]*[0-9A-Z])[A-Za-z0-9]{6,}|[a-z]{16,})(?![A-Za-z0-9]|_[a-z])"
        r"|gh[pousr]_\w{8,}|github_pat_\w{8,}|glpat-[\w-]{8,}|xox[a-z]-[\w-]{8,}|xapp-[\w-]{8,}"
        r"|A(?:KIA|SIA|BIA|CCA)[A-Z0-9]{12,}|AIza[\w-]{20,}|ya29\.[\w-]+|GOCSPX-[\w-]+|npm_\w{20,}|pypi-[\w-]{16,}"
        r"|SG\.[\w.-]{16,}|hvs\.[\w-]{10,}|dop_v1_\w+|nvapi-[\w-]{10,}|gsk_\w{10,}|r8_\w{20,}|xai-[\w-]{20,}"
        r"|pplx-\w{10,}|lsv2_\w+|wandb_v1_\w+|local-[0-9a-f]{40}|[0-9]{8,10}:[\w-]{35}"
        r"|eyJ[\w-]{5,}\.[\w-]+(?:\.[\w-]*)?)"
    ),
    re.compile(r"(?P<secret>hooks\.slack\.com/[\w/-]+|discord(?:app)?\.com/api/webhooks/[\w/-]+)"),
    re.compile(r"(?<![\w*-])(?P<secret>[\w-]{2,}\*{3,}[\w-]*|[\w-]*\*{3,}[\w-]{2,})"),
)
# Without one of these a text is a word, in which nothing but a key format can be.
TELLTALE = re.compile(r"[\s:=@<\"'`]")
# `two tokens: set one of them`, `--hub_token: expected one argument`.
PROSE = re.compile(
    r"(?:key|token)s?: [A-Za-z][a-z]{,14}(?![\w.-])|[\w-]+: (?:expected|ignored|invalid|it should|not) "
)
NO_SECRET = re.compile(r"true|false|none|null", re.IGNORECASE)
NUMBERS = re.compile(r"[-+0-9.,_\s\[\](){}]+(?:e[-+]?[0-9]+[\])}]*)?", re.IGNORECASE)
BRACKETS = {"[": "]", "(": ")", "{": "}"}


def mask_text(text: str, found: set[str] | None = None) -> str:
    """A text without anything that looks like a key, a token or a password.

    That is: values of names that `is_secret_name` knows, `name=value`, `"name": "value"` and `--name value`; the user
    of an address, and its query where that is signed; `Authorization` and `Cookie` headers, bearer and basic
    credentials; private keys; and the key formats of well-known services.

    Args:
        text: of any kind.
        found: gets what was masked.
    """
    note = set() if found is None else found
    if TELLTALE.search(text):
        text = _without_named(text, note)
    for pattern in KEY_FORMATS:
        text = pattern.sub(lambda match: _masked(match, note), text)
    return text


def _without_named(text: str, note: set[str]) -> str:
    text = BASIC.sub(lambda match: _masked(match, note) if _is_user_and_password(match["secret"]) else match[0], text)
    for pattern in SECRETS:
        text = pattern.sub(lambda match: _masked(match, note), text)
    text = QUERY.sub(lambda match: match[0][0] + _masked_query(match["query"], note), text)
    for opening in (*NAMED, *PHRASES):
        text = _without_values(opening, text, note)
    return text


def _masked(match: re.Match[str], found: set[str]) -> str:
    secret, (start, end) = match["secret"], match.span("secret")
    note_secret(secret, found)
    return match[0][: start - match.start()] + HIDDEN + match[0][end - match.start() :]


def _masked_query(query: str, found: set[str]) -> str:
    """A query without its secrets; where it is signed, without any value: together they are what opens the address."""
    names = [match["name"] for match in PARAMETER.finditer(query)]
    is_signed = any({"sig", "signature", "hmac"} & set(_words(name)) for name in names)

    def shown(match: re.Match[str]) -> str:
        if is_secret_name(match["name"]):
            return _masked(match, found)
        # The date of a signature is no secret elsewhere.
        return _masked(match, set()) if is_signed else match[0]

    return PARAMETER.sub(shown, query)


def _is_user_and_password(word: str) -> bool:
    """Whether it is what follows `Basic` in a header; English text may follow it, too."""
    try:
        return b":" in base64.b64decode(word + "=" * (-len(word) % 4), altchars=b"-_" if "_" in word else None)
    except binascii.Error:
        return False


def _without_values(opening: re.Pattern[str], text: str, found: set[str]) -> str:
    """The text without the values of secret names that `opening` comes before."""
    parts, position = [], 0
    for match in opening.finditer(text):
        name = match.groupdict().get("name")
        if match.start() < position or not (name is None or is_secret_name(name)):
            continue
        start, end = _value_at(text, match.end())
        if not is_harmless_in_text(name or "", text[start:end]) and not PROSE.match(text, match.start()):
            note_secret(text[start:end], found)
            parts += [text[position:start], HIDDEN]
            position = end
    return "".join([*parts, text[position:]])


def _value_at(text: str, start: int) -> tuple[int, int]:
    """Where the value that begins there begins and ends, without its quotes."""
    if block := BLOCK.match(text, start):
        return block.span()
    if text[start : start + 1] in BRACKETS:
        return start, _closing_bracket(text, start)
    value = VALUE.match(text, start)
    return value.span(value.lastgroup or 0) if value is not None else (start, start)


def _closing_bracket(text: str, start: int) -> int:
    """Behind the bracket that closes the one at `start`, or at the end of the line if none does."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] in BRACKETS) - (text[place] in BRACKETS.values())
        if depth == 0:
            return place + 1
    return start + len(text[start:].partition("\n")[0])


# ---- quotations ----

# What stands for the characters of a key that are left out.
BLANKS = re.compile(r"[*•…·#]+|\.{2,}|[xX]{3,}")
SHORTEST_END, SHORTEST_PART = 4, 8
# Beside it the end of a key is a part of another word.
WORD_END = re.compile(r"\w")
# Replaces secrets until all are found, since `HIDDEN` has letters that a secret may have too.
PLACE = "\0"


def mask_quotations(text: str, secrets: Collection[str]) -> str:
    """A text without secrets, and without parts of them that tell which they are.

    That is: the first or last four characters or more, as a word; eight characters in a row; `sk-ab***yz`; fewer
    characters that the text calls its first or last ones. Upper and lower case are the same here.

    Args:
        text: an error's, which may quote a key that was refused.
        secrets: the keys. Of one of less than eight characters only all of it is hidden, and only by itself.
    """
    for secret in sorted(filter(None, secrets), key=len, reverse=True):
        text = _without_quotations(text, secret)
    return re.sub(f"{PLACE}+", HIDDEN, text)


def _without_quotations(text: str, secret: str) -> str:
    forms = {secret, quote(secret, safe=""), json.dumps(secret)[1:-1], html.escape(secret)}
    either = "|".join(map(re.escape, sorted(forms, key=len, reverse=True)))
    if len(secret) < SHORTEST_PART:
        return re.sub(rf"(?<!\w)(?:{either})(?!\w)", PLACE, text)
    text = re.sub(either, PLACE, text, flags=re.IGNORECASE)
    text = re.sub(r"[^\s\"'`<>()\[\]{},;]+", lambda match: _without_blanked(match[0], secret.lower()), text)
    text = _without_parts(text, secret)
    ends = "|".join(re.escape(end) for end in (secret[:3], secret[-3:], secret[:2], secret[-2:]))
    said = r"(\b(?:begin|end|first|last|prefix|start|suffix)[^\n]{0,40}?)(?<![\w-])"
    return re.sub(rf"{said}(?:{ends})(?![\w-])", rf"\1{PLACE}", text, flags=re.IGNORECASE)


def _without_blanked(word: str, secret: str) -> str:
    """Nothing of a word whose blanks stand for the inside of a secret."""
    stripped = word.rstrip(".:!?")
    for blanks in BLANKS.finditer(stripped):
        head, tail = stripped[: blanks.start()].lower(), stripped[blanks.end() :].lower()
        # In front there may be its name: `key=sk-ab***`.
        heads = {head, re.split(r"[=:/]", head)[-1]} - {""}
        if any(map(secret.startswith, heads)) or (tail and secret.endswith(tail)):
            return PLACE + word[len(stripped) :]
    return word


def _without_parts(text: str, secret: str) -> str:
    secret, lowered = secret.lower(), text.lower()
    if len(lowered) != len(text):
        lowered = text
    parts = {secret[start : start + SHORTEST_PART] for start in range(len(secret) - SHORTEST_PART + 1)}
    sizes = range(SHORTEST_END, SHORTEST_PART)
    heads, tails = {secret[:size] for size in sizes}, {secret[-size:] for size in sizes}
    hidden = [False] * len(text)
    for start in range(len(text)):
        for end in range(start + SHORTEST_END, min(start + SHORTEST_PART, len(text)) + 1):
            part = lowered[start:end]
            is_head = part in heads and not WORD_END.search(lowered[max(start - 1, 0) : start])
            is_tail = part in tails and not WORD_END.search(lowered[end : end + 1])
            if part in parts or is_head or is_tail:
                hidden[start:end] = [True] * (end - start)
    runs = itertools.groupby(range(len(text)), key=hidden.__getitem__)
    return "".join(PLACE if is_hidden else "".join(text[place] for place in run) for is_hidden, run in runs)
