"""The `openai` package's client, with a limit on each request from connecting to the last byte of its answer."""

import asyncio
import sys
from typing import Any

from openai import AsyncOpenAI, DefaultAsyncHttpxClient


# Versions of the package are built on httpx or on httpx2: the one whose client theirs is.
httpx = sys.modules[DefaultAsyncHttpxClient.__bases__[0].__module__.partition(".")[0]]


class _BoundedHTTP(DefaultAsyncHttpxClient):
    """The limits of httpx are on single reads and writes: a server that sends a byte a second never meets them."""

    def __init__(self, seconds: float):
        super().__init__(timeout=None)
        self.seconds = seconds

    async def send(self, request: Any, **kwargs: Any) -> Any:
        """Includes redirects and the complete body, which is read here unless it is streamed."""
        try:
            async with asyncio.timeout(self.seconds):
                return await super().send(request, **kwargs)
        except TimeoutError as error:
            # Of the kind after which the package asks again.
            raise httpx.ReadTimeout(f"no complete answer within {self.seconds:g} s", request=request) from error
        except httpx.HTTPError:
            raise
        except Exception as error:
            # What a server says can meet code that did not expect it: a redirect to port 99999, say.
            raise httpx.RemoteProtocolError(f"{type(error).__name__}: {error}", request=request) from error


def bounded_client(api_key: str, base_url: str, max_retries: int, timeout: float) -> AsyncOpenAI:
    """A client whose requests and retries take at most `timeout` seconds each."""
    return AsyncOpenAI(
        api_key=api_key,
        base_url=base_url,
        max_retries=max_retries,
        timeout=None,
        http_client=_BoundedHTTP(timeout),
    )
