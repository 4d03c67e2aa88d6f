"""Rewards that a server gives: prompts and completions go over as JSON, scores come back."""

import asyncio
import json
import math
import os
import random
from typing import Any

import httpx

from trl_apa.redaction import without_secrets, without_secrets_in_error
from trl_apa.redaction.patterns import HIDDEN


KEY_VARIABLE = "TRL_APA_REWARD_KEY"
# Statuses after which the same request may get an answer.
TRY_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
FIRST_WAIT, LONGEST_WAIT = 0.5, 20.0
DEFAULT_TIMEOUT = 300.0
EXCERPT = 300


class RewardServerError(RuntimeError):
    """The server gave no scores, retries included, or something else than scores."""


class _Problem(Exception):
    """Why one request got no scores.

    Args:
        text: for people, secrets included.
        again: whether the same request may get an answer.
        wait: seconds that the server asks to wait before.
    """

    def __init__(self, text: str, again: bool, wait: float | None = None):
        super().__init__(text)
        self.again, self.wait = again, wait


def is_address(value: Any) -> bool:
    """Whether a reward function is given as the address of a server."""
    return isinstance(value, str) and value.lower().startswith(("http://", "https://"))


class ServedReward:
    """A reward function behind an address, see `docs/rewards.md` for what it is sent and should answer.

    It sends one request for all completions of a process. After a lost connection and the statuses in `TRY_AGAIN` it
    asks again, and waits longer each time, or as long as the server says in `Retry-After`.

    Args:
        url: `http://...` or `https://...`. Redirects are not followed.
        timeout: seconds for everything, retries included.
        max_retries: how often it asks again.
        api_key_env: the environment variable that may hold a key, sent as `Authorization: Bearer`. It is read for each
            request, and neither logged nor part of an error.

    Raises:
        ValueError: if `url` is no address.
    """

    # `reward_timeout` is its own limit, and its error says more than that of who waits for it.
    limits_itself = True

    def __init__(
        self,
        url: str,
        timeout: float = DEFAULT_TIMEOUT,
        max_retries: int = 6,
        api_key_env: str = KEY_VARIABLE,
    ):
        try:
            address = httpx.URL(url)
        except (httpx.InvalidURL, ValueError):
            address = None
        if address is None or not address.host or (address.port or 0) >= 2**16:
            raise ValueError(
                f"reward_funcs has {without_secrets(url)!r}; it should be http://HOST... or https://HOST..."
            )
        self.url, self.timeout, self.max_retries, self.api_key_env = address, timeout, max_retries, api_key_env
        port = "" if address.port is None else f":{address.port}"
        # Without user and query, which may hold a key.
        self.__name__ = f"{address.host}{port}{address.path.rstrip('/')}"

    async def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> list[Any]:
        """One score a completion, as the server gave it.

        Raises:
            RewardServerError: after `timeout`, or when there is nothing to try again.
        """
        content = _encoded({"prompts": prompts, "completions": completions, "columns": columns})
        problems: list[str] = []
        failed: str | None = None
        try:
            async with asyncio.timeout(self.timeout if math.isfinite(self.timeout) else None):
                return await self._ask(content, problems)
        except TimeoutError:
            failed = f"no scores within {self.timeout:g} seconds"
            failed += f"; the last try: {problems[-1]}" if problems else ""
        except _Problem as problem:
            failed = str(problem) + (f" (asked {len(problems)} times)" if len(problems) > 1 else "")
        # Raised out here it does not carry along the request, in which the key stands.
        raise RewardServerError(f"{self.__name__}: {self._shown(failed)}")

    async def _ask(self, content: bytes, problems: list[str]) -> list[Any]:
        async with httpx.AsyncClient(timeout=None) as client:
            while True:
                try:
                    return await self._scores(client, content)
                except _Problem as problem:
                    problems.append(str(problem))
                    if not problem.again or len(problems) > self.max_retries:
                        raise
                    wait = min(FIRST_WAIT * 2 ** (len(problems) - 1), LONGEST_WAIT) * random.Random().uniform(0.5, 1.0)
                    await asyncio.sleep(wait if problem.wait is None else problem.wait)

    async def _scores(self, client: httpx.AsyncClient, content: bytes) -> list[Any]:
        headers = {"Content-Type": "application/json"}
        if key := self._key():
            headers["Authorization"] = f"Bearer {key}"
        try:
            response = await client.post(self.url, content=content, headers=headers)
        except httpx.HTTPError as error:
            raise _Problem(f"{type(error).__name__}: {error}", again=True) from None
        except Exception as error:  # what a server says can meet code that did not expect it
            raise _Problem(f"{type(error).__name__}: {error}", again=False) from None
        if response.status_code != 200:
            again = response.status_code in TRY_AGAIN
            raise _Problem(f"HTTP {response.status_code}: {_text(response)}", again, _retry_after(response))
        try:
            answer = json.loads(response.content)
        except (ValueError, RecursionError):
            raise _Problem(f"an answer that is no JSON: {_text(response)}", again=False) from None
        scores = answer.get("scores") if isinstance(answer, dict) else answer
        if not isinstance(scores, list):
            raise _Problem(f'an answer without a list of "scores": {_text(response)}', again=False)
        return scores

    def _key(self) -> str:
        key = os.environ.get(self.api_key_env, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise _Problem(f"the environment variable {self.api_key_env} has characters that no key has", again=False)
        return key

    def _shown(self, text: str) -> str:
        """Its beginning, in one line, without secrets: servers may repeat the key that they refuse."""
        key = os.environ.get(self.api_key_env, "").strip()
        text = text.replace(key, HIDDEN) if key else text
        text = without_secrets_in_error(text, {"api_key": key, "url": str(self.url)})
        line = " ".join("".join(character if character.isprintable() else " " for character in text).split())
        return line if len(line) <= EXCERPT else f"{line[:EXCERPT]}..."


def _encoded(body: dict[str, Any]) -> bytes:
    """The request; columns that JSON cannot express are left out.

    Raises:
        RewardServerError: if prompts or completions are such.
    """
    columns = {name: column for name, column in body["columns"].items() if _as_json(column) is not None}
    content = _as_json({**body, "columns": columns})
    if content is None:
        raise RewardServerError("prompts and completions cannot be sent as JSON")
    return content


def _as_json(value: Any) -> bytes | None:
    try:
        # A lone surrogate, half of a character, is escaped.
        return json.dumps(value, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError):
        return None


def _text(response: httpx.Response) -> str:
    return response.content.decode("utf-8", "replace").strip() or "an empty answer"


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds that the server asks to wait; None if it does not say so in seconds."""
    try:
        seconds = float(response.headers.get("Retry-After", ""))
    except ValueError:
        return None
    return seconds if 0 <= seconds < math.inf else None
