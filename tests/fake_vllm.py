"""What TRL's classes call of vLLM, done by transformers: the real thing takes gigabytes and starts slowly.

`tests/test_vllm_real.py` has the real thing.

The engine runs on behind the ends of responses, as vLLM may behind a stop string. What it is sent over the wire it
keeps until it has all of it, as vLLM does.
"""

import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from json import dumps, loads
from types import ModuleType, SimpleNamespace

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from trl_apa.rollout.generation import neutral_generation_config


class SamplingParams(SimpleNamespace):
    """The options of one call."""


class LLM:
    """Holds a copy of the model from its folder, and samples from it."""

    def __init__(self, model, **options):
        self.options, self.calls, self.events = options, [], []
        self.network = AutoModelForCausalLM.from_pretrained(model).eval()

    def collective_rpc(self, method, kwargs):
        assert method == "reload_weights"
        self.load_weights(kwargs["weights_iterator"])

    def apply_model(self, function):
        return [function(self.network)]

    def load_weights(self, weights):
        own = dict(self.network.named_parameters())
        with torch.no_grad():
            for name, tensor in weights:
                assert own[name].shape == tensor.shape, name
                own[name].copy_(tensor)
                self.events.append(name)

    def reset_prefix_cache(self):
        self.events.append("synced")

    def wake_up(self, tags):
        self.events.append(("wake", *tags))

    def sleep(self, level):
        self.events.append(("sleep", level))

    def generate(self, prompts, sampling_params, use_tqdm):
        self.calls.append(sampling_params)
        outputs = []
        for prompt in prompts:
            prompt_ids = prompt["prompt_token_ids"]
            answer = self.answer(prompt_ids)
            logprobs = self.logprobs(prompt_ids, answer) if sampling_params.logprobs is not None else None
            output = SimpleNamespace(token_ids=answer, logprobs=logprobs)
            outputs.append(SimpleNamespace(prompt_token_ids=prompt_ids, outputs=[output]))
        return outputs

    @torch.no_grad()
    def logprobs(self, prompt_ids, answer):
        """Of the tokens of an answer, in vLLM's form."""
        logits = self.network(torch.tensor([[*prompt_ids, *answer]])).logits[0, len(prompt_ids) - 1 : -1]
        of_tokens = logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0].tolist()
        rows = zip(answer, of_tokens, strict=True)
        return [{token: SimpleNamespace(logprob=logprob, rank=1)} for token, logprob in rows]

    def answer(self, prompt_ids):
        """As many tokens as are allowed; the prompt alone, without padding."""
        wanted = self.calls[-1]
        sampled = wanted.temperature > 0
        options = {"temperature": wanted.temperature, "top_k": wanted.top_k} if sampled else {}
        config = GenerationConfig(do_sample=sampled, max_new_tokens=wanted.max_tokens, pad_token_id=0, **options)
        with torch.no_grad(), neutral_generation_config(self.network):
            tokens = self.network.generate(torch.tensor([prompt_ids]), generation_config=config)
        return tokens[0, len(prompt_ids) :].tolist()


class Server:
    """`vllm serve` as TRL's client sees it, over HTTP on this machine; `llm` is what it holds."""

    def __init__(self, model):
        self.llm, self.requests, self.failing, self.reports = LLM(model), [], False, False
        self.logprobs_mode = None
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                told = {"logprobs_mode": server.logprobs_mode} if server.logprobs_mode else {}
                told = {"vllm_config": {"model_config": told}}
                self.answer(told if self.path.startswith("/server_info") else {"data": [{"id": model}]})

            def do_POST(self):
                body = loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
                server.requests.append((self.path, body))
                if server.failing and self.path == "/v1/completions":
                    self.send_error(400, f"out of memory, asked with {self.headers['Authorization']}")
                    return
                self.answer(server.complete(body) if self.path == "/v1/completions" else {"success": True})

            def answer(self, content):
                body = dumps(content).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def complete(self, body):
        self.llm.calls.append(SamplingParams(**body))
        answers = [self.llm.answer(prompt) for prompt in body["prompt"]]
        pairs = list(zip(body["prompt"], answers, strict=True))
        logprobs = [self.logprobs(*pair) if self.reports else None for pair in pairs]
        rows = zip(pairs, logprobs, strict=True)
        return {
            "choices": [{"prompt_token_ids": pair[0], "token_ids": pair[1], "logprobs": row} for pair, row in rows]
        }

    def logprobs(self, prompt, answer):
        """As a server writes them."""
        rows = self.llm.logprobs(prompt, answer)
        numbers = [entry.logprob for row in rows for entry in row.values()]
        tokens = [f"token_id:{token}" for token in answer]
        return {"tokens": tokens, "token_logprobs": numbers, "top_logprobs": [None] * len(answer)}

    def close(self):
        self.http.shutdown()
        self.http.server_close()


def install(monkeypatch, server=None):
    """Make TRL find vLLM: this one. Weights go to `server` without NCCL, which needs a GPU."""

    class NCCLWeightTransferEngine:
        @staticmethod
        def trainer_send_weights(iterator, trainer_args):
            server.llm.load_weights(list(iterator))

    modules = {
        "vllm": {"LLM": LLM, "SamplingParams": SamplingParams, "RequestOutput": SimpleNamespace},
        "vllm.sampling_params": {"StructuredOutputsParams": SimpleNamespace},
        "vllm.utils": {},
        "vllm.utils.network_utils": {"get_ip": lambda: "127.0.0.1"},
        "vllm.distributed": {},
        "vllm.distributed.weight_transfer": {},
        "vllm.distributed.weight_transfer.nccl_engine": {
            "NCCLTrainerSendWeightsArgs": SimpleNamespace,
            "NCCLWeightTransferEngine": NCCLWeightTransferEngine,
        },
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)

    def available(min_version=None):
        return min_version is None  # older than every version that TRL asks after

    monkeypatch.setattr(import_module("trl.import_utils"), "is_vllm_available", available)
    monkeypatch.setattr("trl_apa.config.vllm.is_vllm_available", available)
    for name in [name for name in sys.modules if name.startswith("trl.generation.vllm")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        # TRL sets these for vLLM; processes that later tests start should not see them.
        before = os.environ.get(name)
        monkeypatch.setenv(name, before or "")
        if before is None:
            monkeypatch.delenv(name)
    client = import_module("trl.generation.vllm_client").VLLMClient
    monkeypatch.setattr(client, "init_communicator", lambda self, device: None)
