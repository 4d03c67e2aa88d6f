"""Ways in which options hold a secret, and options that hold one each."""

import dataclasses
import functools
import json
import os
import pickle
from collections import OrderedDict, deque
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import NamedTuple

from hypothesis import strategies as st
from transformers import GenerationConfig


SECRET_NAMES = """
    key keys api_key api-key apiKey APIKey API_KEY apikey api_key_id api_keys x-api-key-header X-Api-Key OPENAI_API_KEY
    aws_access_key_id aws_secret_access_key accessKey private_key sshKey signing_key AccountKey wandb_key key_value
    token tokens hub_token hfToken HF_TOKEN access_tokens authToken id_token token_value refreshToken bot-token
    secret secrets client_secret clientsecret clientSecretValue SECRET_KEY password passwords db_password dbPassword
    DB_PASSWORD_FILE passwd pwd db_pwd passphrase pass smtp_pass auth http_auth basicAuth oauth oauth2_client
    authorization Authorization Proxy-Authorization authentication bearer bearer_header credential credentials
    aws_credentials creds cookie cookies Set-Cookie session session_id sessionId signature X-Amz-Signature sig
    request_signature jwt sas hmac_digest dsn webhook_url sentry_dsn github_pat otp
""".split()
HARMLESS_NAMES = """
    pad_token eos_token bos_token unk_token cls_token sep_token mask_token additional_special_tokens stop_token
    max_new_tokens max_tokens num_tokens tokens_per_second tokenizer tokenizer_name tokenizer_name_or_path tokenization
    include_num_input_tokens_seen num_assistant_tokens_schedule keys_to_ignore_at_inference key_padding
    key_padding_mask sort_key monkey turkey keyboard keyword keypoint author authors author_name authority authentic
    passage bypass_transformer compass passive secretary sigma signal sign design assign cookiecutter
    obsession possession obsessed pattern path patch hub_model_id run_name learning_rate output_dir attn_implementation
    project entity tags notes group name value label_names beta accessory creditor assassin
""".split()


@dataclasses.dataclass
class Login:
    user: str
    password: object


@dataclasses.dataclass(slots=True, frozen=True)
class Slotted:
    api_key: object


class Header(NamedTuple):
    name: str
    auth_token: object


class WithSlots:
    __slots__ = ("api_key", "other")

    def __repr__(self):
        return f"WithSlots({self.api_key!r})"


def with_slots(secret):
    made = WithSlots()
    made.api_key = secret
    return made


def generation_config(value):
    config = GenerationConfig(max_new_tokens=7)
    config.client_secret = value
    return config


# How a secret may be given: under its name, or in a text that shows what it is.
UNDER_NAMES = [lambda secret, name=name: {name: secret} for name in SECRET_NAMES]
OBJECTS = [
    lambda secret: Login("me", secret),
    Slotted,
    lambda secret: Header("x", secret),
    lambda secret: SimpleNamespace(apiKey=secret),
    lambda secret: SimpleNamespace(dtype="bfloat16", loading={"token": secret}),
    lambda secret: SimpleNamespace(inner=Login("me", [secret])),
    lambda secret: functools.partial(print, "x", token=secret),
    lambda secret: MappingProxyType({"token": secret}),
    lambda secret: deque([{"token": secret}]),
    lambda secret: with_slots(secret),
    lambda secret: {b"api_key": secret},
    lambda secret: OrderedDict(token=secret.encode()),
    lambda secret: {"auth": {secret: "x"}},
    generation_config,
    lambda secret: {"name": "X-Api-Key", "value": secret},
    lambda secret: ("Authorization", secret),
    lambda secret: [["api_key", secret], ["other", 1]],
    lambda secret: ["run.py", "--hub_token", secret, "--seed", "3"],
    lambda secret: ["run.py", f"--hub-token={secret}"],
    lambda secret: ["run.py", "--tracker_kwargs", json.dumps({"wandb": {"api_key": secret}})],
    lambda secret: Path("runs") / f"token={secret}",
    lambda secret: {f"https://me:{secret}@host": 1},
    lambda secret: frozenset([f"Bearer {secret}"]),
]
# § is where it stands.
TEXTS = [
    "https://me:§@host:8000/v1",
    "https://§@github.com/me/run.git",
    "postgresql+psycopg2://me:§@db/runs?sslmode=require",
    "me:§@localhost:8000",
    "https://host/v1?api_key=§&run=7",
    "https://host/v1?run=7&access_token=§#top",
    "https://host/#id_token=§",
    "https://bucket.s3.amazonaws.com/x?X-Amz-Credential=a&X-Amz-Date=3&X-Amz-Signature=§",
    "https://storage.googleapis.com/x?X-Goog-Credential=a&X-Goog-Signature=§",
    "https://me.blob.core.windows.net/x?sv=2024-01-01&se=2030&sp=r&sig=§",
    "https://d.cloudfront.net/x?Expires=1&Policy=§&Signature=b&Key-Pair-Id=c",
    "Bearer §",
    "a request with authorization: Bearer § was refused",
    "Authorization: token §",
    "Authorization: §",
    "Cookie: theme=dark; sid=§; lang=en",
    "{'Proxy-Authorization': 'Basic §'}",
    "export WANDB_API_KEY=§",
    "python run.py --hub_token § --seed 3",
    "password: §",
    "password = '§'",
    "Login(user='me', password='§')",
    'os.environ["HF_TOKEN"] = "§"',
    '{"headers": {"x-api-key": "§"}, "timeout": 3}',
    '[{"token": "§", "token": null}]',
    "{'secrets': {'a': {'b': '§'}}, 'n': 1}",
    '"{\\"api_key\\": \\"§\\"}"',
    "AccountName=me;AccountKey=§;EndpointSuffix=x",
    "API key provided: §",
    "the token '§' has expired",
    "[(b'x-api-key', b'§'), (b'accept', b'*/*')]",
    "<Error><SecretAccessKey>§</SecretAccessKey></Error>",
    "-----BEGIN RSA PRIVATE KEY-----\n§\n-----END RSA PRIVATE KEY-----",
    "notes: sk-§",
    "hf_§",
    "a run with ghp_§ in it",
    "https://hooks.slack.com/services/T0/B0/§",
    "curl -u me:§ https://host",
    "curl -H 'X-Api-Key: §' https://host",
    "Command '['python', '--hub_token', '§']' returned non-zero exit status 1.",
    "logging in with token §",
    "https://host/run;jsessionid=§?a=1",
    "api_keys:\n  - §\n  - §\nsteps: 3",
    "secret: |\n  §\nsteps: 3",
    'Authorization: Digest username="me", response="§"',
    "Authorization: AWS4-HMAC-SHA256 Credential=AKIAX/2024, SignedHeaders=host, Signature=§",
    "{'name': 'X-Api-Key', 'value': '§'} among headers",
    "git+https://oauth2:§@gitlab.com/me/x.git@main#egg=x",
    "https://host/?a=1&amp;token=§&amp;b=2",
    "redis://:§@host:6379/0",
    'a broken line: password="§',
]
CARRIERS = [*UNDER_NAMES, *OBJECTS, *(lambda secret, text=text: text.replace("§", secret) for text in TEXTS)]
HARMLESS = st.one_of(
    st.integers(),
    st.booleans(),
    st.none(),
    st.sampled_from(["w2 w3", "cosine", "https://host/v1?page=2", "me/model", "{}", "[1, 2]", "</s>", "2306.02231"]),
)
MANY = int(os.environ.get("MANY", 150))
SECRETS = st.from_regex(r"[a-z][A-Z][0-9][A-Za-z0-9]{9,16}", fullmatch=True)


@st.composite
def options_with_a_secret(draw):
    """The secret, and it in a structure of dicts, lists, tuples and objects, beside what is harmless."""
    secret = draw(SECRETS)
    value = draw(st.sampled_from(CARRIERS))(secret)
    for _ in range(draw(st.integers(0, 4))):
        wrap = draw(
            st.sampled_from(
                [
                    lambda value, other: {"settings": value, "steps": other},
                    lambda value, other: [other, value, other],
                    lambda value, other: (value,),
                    lambda value, other: SimpleNamespace(config=value, other=other),
                    lambda value, other: json.dumps({"a": [value, other]}) if is_json(value) else [value],
                ]
            )
        )
        value = wrap(value, draw(HARMLESS))
    return secret, value


def is_json(value):
    try:
        return json.loads(json.dumps(value)) == value
    except TypeError:
        return False


def everything(value):
    """All that printing, JSON or a pickle would show of a value."""
    return (
        repr(value) + json.dumps(value, default=vars_or_repr, skipkeys=True) + repr(pickle.dumps(vars_or_repr(value)))
    )


def vars_or_repr(value):
    return repr(getattr(value, "__dict__", value))


PLANTED = {
    "hub_token": "hf_Q7hubZ0pLm4",
    "run_name": "Q7runZ0pLm4T",
    "config": "Q7configZ0pL",
    "settings": "Q7settingsZ0" * 4,
    "best": "Q7bestZ0pLm4",
    "accelerator": "Q7accelZ0pLm",
    "project": "Q7projectZ0p",
    "template": "Q7templateZ0",
    "server": "Q7serverZ0pL",
    "added": "Q7addedZ0pLm",
}


def planted_options():
    """Each option that can hold a secret holds one of its own, and `marker`, which is none."""
    wandb_options = {
        "settings": {"api_key": PLANTED["settings"][:40], "init_timeout": 300},
        "config": {"judge": {"headers": [("Authorization", f"Bearer {PLANTED['config']}")]}, "marker": "Shown0Config"},
        "notes": f"Shown0Notes with {PLANTED['hub_token']}",
        "tags": ["Shown0Tag", f"key={PLANTED['config']}"],
        "group": f"https://me:{PLANTED['run_name']}@host/Shown0Group",
        "name": f"Shown0Name?token={PLANTED['run_name']}",
    }
    return {
        "hub_token": PLANTED["hub_token"],
        "run_name": f"Shown0Run token={PLANTED['run_name']}",
        "tracker_project_name": f"Shown0Project-{PLANTED['hub_token']}",
        "tracker_kwargs": {"wandb": wandb_options},
        "push_to_hub_if_best_kwargs": {"repo_id": "me/Shown0Best", "token": PLANTED["best"]},
        "accelerator_kwargs": json.dumps({"kwargs": [{"init": {"storePassword": PLANTED["accelerator"]}}]}),
        "project_kwargs": {"logging_dir": f"s3://AK:{PLANTED['project']}@bucket/Shown0Dir"},
        "chat_template_kwargs": {"tools": [{"x-api-key-header": PLANTED["template"]}], "marker": "Shown0Template"},
        "vllm_server_base_url": f"http://me:{PLANTED['server']}@localhost:8000/Shown0Server",
    }


def leaks(text):
    return [name for name, secret in PLANTED.items() if secret[:12] in text]
