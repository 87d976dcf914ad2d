"""One request through the ``openai`` client, and what its errors mean: ask again, never again, or no more at all.

The client's own retries are off: they would be neither counted nor held to the limits.
"""

import importlib.util
import math
import time
from email.utils import mktime_tz, parsedate_tz
from typing import Any

from megatron_eagle.endpoint.question import Question, Reply
from megatron_eagle.endpoint.settings import NO_KEY, Endpoint
from megatron_eagle.errors import UserError

REFUSED = (400, 413, 422)  # this question, not the next one
TWICE = (408, 409, 425, 429)  # and all of 5xx: the same question may be answered later


class Again(Exception):
    """Nothing came back this time. reason: a few words by which it is counted. after: seconds to wait, if said."""

    def __init__(self, reason: str, after: float | None = None, detail: str = "") -> None:
        super().__init__(f"{reason}{': ' * bool(detail)}{detail}")
        self.reason, self.after = reason, after


class _NoCompletion(Exception):
    """A body that is none."""


def check_installed() -> None:
    """UserError if the package openai is missing."""
    if importlib.util.find_spec("openai") is None:
        raise UserError(
            "a model behind an endpoint needs the package openai: pip install '.[endpoint]' beside setup.py"
        )


class ChatClient:
    """A model behind an endpoint; threads may share it."""

    def __init__(self, endpoint: Endpoint, key: str) -> None:
        check_installed()
        import openai

        self._endpoint, self._key = endpoint, key
        # Everything that the client would otherwise look for in the environment is given, but for proxies.
        headers = {"OpenAI-Organization": openai.Omit(), "OpenAI-Project": openai.Omit()}
        self._client = openai.OpenAI(
            api_key=key, base_url=endpoint.url, timeout=endpoint.timeout, max_retries=0, default_headers=headers  # type: ignore[arg-type]
        )  # fmt: skip

    def close(self) -> None:
        """Ends the connections."""
        self._client.close()

    def check(self) -> None:
        """UserError if nobody listens, or the key is refused: asked of the list of models, which costs nothing."""
        import openai

        try:
            self._client.models.list()
        except openai.APIConnectionError as error:
            raise self._missing(error) from None
        except openai.APIStatusError as error:
            if error.status_code in (401, 403):
                raise self._refusal(error) from None
        except (openai.OpenAIError, ValueError, TypeError, AttributeError):
            pass  # not every endpoint has such a list

    def complete(self, question: Question) -> Reply:
        """The answer; Again, or UserError if the endpoint will answer nothing."""
        import openai

        try:
            response = self._client.chat.completions.create(**question.request(self._endpoint.model))
        except openai.APITimeoutError:
            raise Again(f"no answer within {self._endpoint.timeout:g} s") from None
        except openai.APIConnectionError as error:
            raise Again("the connection failed", detail=self._plain(error.__cause__ or error)[:100]) from None
        except openai.APIStatusError as error:
            return self._status(error)
        except (openai.OpenAIError, ValueError) as error:  # a body that is no JSON raises that of json
            raise Again("the body is not JSON", detail=self._plain(error)[:100]) from None
        try:
            return _reply(response)
        except _NoCompletion as error:
            raise Again("the body is no chat completion", detail=self._plain(error)[:100]) from None

    def _plain(self, said: Any) -> str:
        """Words of an endpoint on one line, without the key, which some repeat: they are kept and shown to others."""
        words = " ".join(str(said).split()).encode(errors="replace").decode()
        return words if self._key == NO_KEY else words.replace(self._key, "***")

    def _words(self, error: Any) -> str:
        """What the endpoint says of it."""
        said = error.body.get("message") if isinstance(error.body, dict) else None
        return self._plain(said or error.message)[:150]

    def _status(self, error: Any) -> Reply:
        """What an error that the endpoint tells of means."""
        status = error.status_code
        if status in REFUSED:
            return Reply("", unanswered=f"refused by the endpoint ({status}): {self._words(error)}")
        if status == 429 and getattr(error, "code", None) == "insufficient_quota":
            raise UserError(f"{self._endpoint.url}: the quota of the key is used up: {self._words(error)}")
        if status in TWICE or status >= 500:
            raise Again(f"status {status}", _seconds(error.response.headers.get("retry-after")), self._words(error))
        raise self._refusal(error)

    def _refusal(self, error: Any) -> UserError:
        what = {401: "refuses the key", 403: "refuses the key", 404: f"has no model '{self._endpoint.model}'"}
        told = what.get(error.status_code, "refuses what is asked")
        return UserError(f"{self._endpoint.url} {told} ({error.status_code}): {self._words(error)}")

    def _missing(self, error: Exception) -> UserError:
        return UserError(f"no endpoint at {self._endpoint.url}: {self._plain(error.__cause__ or error)[:150]}")


def _seconds(header: str | None) -> float | None:
    """Of a retry-after header, which may be a date; None if it is neither, or there is none."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        date = parsedate_tz(header)
        seconds = math.nan if date is None else mktime_tz(date) - time.time()
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _reply(response: Any) -> Reply:
    """The first choice; the client checks no types, so anything may be there."""
    try:
        choice = response.choices[0]
        text, refusal = choice.message.content, getattr(choice.message, "refusal", None)
        usage = getattr(response, "usage", None)
        tokens = (getattr(usage, "prompt_tokens", None), getattr(usage, "completion_tokens", None))
    except (AttributeError, TypeError, IndexError, KeyError):
        raise _NoCompletion(str(response)) from None
    if not isinstance(text, str | None):
        raise _NoCompletion(f"content is a {type(text).__name__}")
    finish = "refusal" if refusal and not text else str(choice.finish_reason)
    read, written = (one if isinstance(one, int) else 0 for one in tokens)
    return Reply(text or "", finish, read, written)
