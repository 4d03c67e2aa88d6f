"""An error that quotes a key, whole or in part, does not tell it."""

import base64
import json
import os
import re
import subprocess
import threading
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import quote

import pytest
from accelerate.commands import launch as accelerate_launch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from tests._secrets import PLANTED, SECRETS, leaks
from tests.fake_vllm import Server, install
from tests.test_training import trainer_for
from tests.tiny import tiny_model
from trl_apa import cli
from trl_apa.commands import launching, train_options
from trl_apa.redaction import errors_without_secrets, without_secrets_in_error
from trl_apa.redaction.patterns import HIDDEN
from trl_apa.winrate.comparing import Question
from trl_apa.winrate.openai import JudgeError, OpenAIJudge


KEY = "sk-proj-7Gq2xVbN4mKpL8sTdWfR3yHjZcA9"
QUOTATIONS = [
    KEY,
    KEY.upper(),
    f"Bearer {KEY}",
    f"Authorization: Basic {base64.b64encode(f'me:{KEY}'.encode()).decode()}",
    f"{KEY[:5]}***{KEY[-4:]}",
    f"{KEY[:5]}***{KEY[-2:]}",
    f"{KEY[:8]}...{KEY[-4:]}",
    f"{KEY[:8]}\u2026{KEY[-4:]}",
    f"{KEY[:12]}************",
    f"************{KEY[-4:]}.",
    f"'{KEY[:6]}' to '{KEY[-6:]}'",
    f"key={KEY[:6]}xxxxxxxx{KEY[-4:]}!",
    f"begins with {KEY[:4]} and ends with {KEY[-3:]}",
    f"last characters: {KEY[-4:]}",
    KEY[9:25],
    f"{KEY[3:-3]}",
    f"<b>{KEY[:-4]}</b>",
    json.dumps({"error": {"message": f"wrong key {KEY[:-6]}"}}),
]


@pytest.mark.parametrize("quoted", QUOTATIONS)
def test_no_part_of_a_key_is_left_that_an_error_quotes(quoted):
    said = without_secrets_in_error(f"Error code: 401 - refused ({quoted}); see the page on limits", {"api_key": KEY})
    assert HIDDEN in said and "Error code: 401" in said and said.endswith("see the page on limits")
    for size, start in ((6, 0), (4, 5), (4, len(KEY) - 4), (3, len(KEY) - 3)):
        assert KEY[start : start + size].lower() not in said.lower(), said


@given(SECRETS.filter(lambda key: len(key) >= 16), st.data())
def test_no_long_part_of_any_key_is_left(key, data):
    start = data.draw(st.integers(0, len(key) - 8))
    part = key[start : start + data.draw(st.integers(8, len(key)))]
    for form in (part, quote(part), part.lower()):
        assert part.lower() not in without_secrets_in_error(f"no: {form}, no", {"token": key}).lower()


def test_an_error_without_a_key_stays_as_it_is(monkeypatch):
    texts = (
        "Connection error.",
        "wait... what?",
        "KeyError: 'x'",
        "Error code: 429 - {'error': {'message': 'slow down'}}",
    )
    assert [without_secrets_in_error(text, {"api_key": KEY}) for text in texts] == list(texts)
    monkeypatch.setenv("MY_SERVICE_TOKEN", "Zq81mmmPPq")
    assert without_secrets_in_error("no such Zq81mmmPPq") == f"no such {HIDDEN}"


def test_errors_behind_an_error_lose_their_secrets_too():
    with pytest.raises(ConnectionError, match=re.escape(f"at http://{HIDDEN}@h")) as raised, errors_without_secrets():
        try:
            raise OSError(7, f"no answer with Bearer {KEY}")
        except OSError as error:
            raise ConnectionError("nothing at http://me:pw@h") from error
    assert KEY not in str(raised.value) + str(raised.value.__cause__) + repr(raised.value.__cause__)

    class Fixed(Exception):
        def __str__(self):
            return f"never {KEY}"

    with pytest.raises(RuntimeError, match=f"Fixed: never {HIDDEN}") as raised, errors_without_secrets({"key": KEY}):
        raise Fixed
    assert raised.value.__suppress_context__


@pytest.fixture
def refusing(monkeypatch):
    """An endpoint that answers 401 and quotes what it is given to quote."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            server.asked.append(self.headers["Authorization"])
            self.rfile.read(int(self.headers["Content-Length"]))
            body = json.dumps({"error": {"message": f"Incorrect API key provided: {server.quoted}"}}).encode()
            self.send_response(401)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked = []
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_judge_whose_endpoint_quotes_the_key_does_not_tell_it(monkeypatch, refusing):
    monkeypatch.setenv("JUDGES_OWN", KEY)
    judge = OpenAIJudge("m", f"http://127.0.0.1:{refusing.server_address[1]}/v1", api_key_env="JUDGES_OWN")
    for refusing.quoted in QUOTATIONS:
        with pytest.raises(JudgeError, match=r"m gave no answer: AuthenticationError: .*401") as raised:
            list(judge([Question("p", "a", "b")]))
        said = "".join(traceback.format_exception(raised.value))
        assert HIDDEN in said and not any(part in said for part in (KEY[:5], KEY[-4:], KEY[9:17]))
    assert set(refusing.asked) == {f"Bearer {KEY}"}


def test_a_vllm_server_that_quotes_a_password_does_not_tell_it(tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path / "model")
    server = Server(str(tmp_path / "model"))
    install(monkeypatch, server)
    login = "me:Vx81-Tq44-Rm90"
    options = {"use_vllm": True, "vllm_mode": "server", "vllm_server_timeout": 1e-9}
    options["vllm_server_base_url"] = server.url.replace("://", f"://{login}@")
    trainer = trainer_for(tmp_path, model=AutoModelForCausalLM.from_pretrained(tmp_path / "model"), **options)
    monkeypatch.setattr(trainer.vllm.engine, "sync_weights", lambda: None)
    server.failing = True
    with pytest.raises(RuntimeError, match=f"(?s)the vLLM server failed: .*asked with Basic {HIDDEN}"):
        trainer.train()

    def fails():
        raise ValueError(f"no weights for {options['vllm_server_base_url']}")

    monkeypatch.setattr(trainer.vllm.engine, "sync_weights", fails)
    trainer.vllm._synced_at = None
    with pytest.raises(ValueError, match=f"no weights for http://{HIDDEN}@127"):
        trainer.train()
    server.close()
    with pytest.raises(OSError, match=f"can't be reached at http://{HIDDEN}@127") as raised:
        trainer_for(tmp_path, model=AutoModelForCausalLM.from_pretrained(tmp_path / "model"), **options)
    shown = "".join(traceback.format_exception(raised.value))
    assert "Vx81" not in shown and base64.b64encode(login.encode()).decode() not in shown


# ---- commands ----


def test_commands_do_not_repeat_secrets_in_what_they_refuse(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(f"hub_token:\n  - {PLANTED['hub_token']}\n")
    (tmp_path / "broken.yaml").write_text(f'seed: 1\nhub_token: "{PLANTED["added"]}\n')
    (tmp_path / "typed.yaml").write_text(f"tracker_kwargs:\n  - api_key: {PLANTED['added']}\n")
    for line in (
        ["--config", str(tmp_path / "run.yaml")],
        ["--config", str(tmp_path / "broken.yaml")],
        ["--config", str(tmp_path / "typed.yaml")],
        ["--seed", f"https://me:{PLANTED['server']}@host"],
        ["--hub_tokn=" + PLANTED["hub_token"]],
        [PLANTED["hub_token"]],
        ["--hub_token"],
    ):
        try:
            status = cli.main(["train", *line])
        except SystemExit as ended:
            status = ended.code
        said = capsys.readouterr().err
        assert status == 2 and said and leaks(said) == [], said
    assert "hub_token/--hub-token: expected one argument" in said


def test_the_help_of_a_command_shows_the_options_of_a_file_without_secrets(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(f"hub_token: {PLANTED['hub_token']}\nrun_name: Shown0Run\n")
    with pytest.raises(SystemExit):
        train_options.main(["--config", str(tmp_path / "run.yaml"), "--help"])
    said = capsys.readouterr().out
    assert "Shown0Run" in said and HIDDEN in said and leaks(said) == []


def test_a_launched_command_that_fails_ends_with_its_status_and_does_not_show_its_options(monkeypatch):
    def fails(args):
        raise subprocess.CalledProcessError(args.status, ["python", "--hub_token", PLANTED["hub_token"]])

    for status, code in ((3, 3), (-15, 143)):
        monkeypatch.setattr(
            accelerate_launch, "launch_command", lambda args, s=status: fails(SimpleNamespace(status=s))
        )
        values = {
            "accelerate_config": "single_gpu",
            "num_processes": None,
            "machine_rank": None,
            "main_process_ip": None,
        }
        with pytest.raises(SystemExit) as ended:
            launching.launch("train", ["--hub_token", PLANTED["hub_token"]], values)
        assert ended.value.code == code and ended.value.__suppress_context__ and launching.LAUNCHED not in os.environ
