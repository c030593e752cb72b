"""Reads a file of prompts: text lines, JSON lines or OpenAI batch lines become token ids, or a reason why not.

A line that cannot be used is refused by its number and does not stop the others; a file that cannot be used is a ConfigError.
"""

from __future__ import annotations

import json
import os
import sys
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator
from dataclasses import dataclass, field
from errno import EACCES, EISDIR, ENOENT
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from klotski_compiler.errors import ConfigError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
CONTEXT_TOKENS = 4
"""Prompt tokens that are decoded along: what a tokenizer puts between two words depends on the first of them."""

CHARACTERS_PER_TOKEN = 4
"""Of English text, roughly; used where there is no tokenizer to ask."""

GIVEN = "given as token ids"

# Fields of an OpenAI request that would change the result if they were obeyed, with the value besides "none" that would not.
_UNSUPPORTED = {
    "n": 1, "best_of": 1, "temperature": 0, "stop": None, "stream": False, "echo": False, "suffix": None, "logprobs": False,
    "logit_bias": None, "frequency_penalty": 0, "presence_penalty": 0, "tools": None, "functions": None,
    "response_format": {"type": "text"},
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Limits:
    """What rows may ask for. new_tokens: for rows that do not say. vocabulary: token ids are below it. planned: whether a plan that takes
    more would help."""

    prompt_len: int
    gen_len: int
    new_tokens: int
    vocabulary: int
    planned: bool = True

    def mend(self, option: str, number: int) -> str:
        """What to do about a row that asks for more."""
        return f"; compile a plan with {option} {number}, or with --input for all rows" if self.planned else ""


@dataclass(slots=True)
class Request:
    """One row of the input. ids: its prompt, empty where the row is ``refused`` with a reason. chat: whether it had messages."""

    line: int
    custom_id: str
    ids: list[int] = field(default_factory=list)
    new_tokens: int = 0
    chat: bool = False
    refused: str = ""


class Encoder(Protocol):
    """Turns text into token ids."""

    @property
    def how(self) -> str:
        """Where the ids of all prompts so far came from, in words."""

    def encode(self, text: str) -> list[int]:
        """Of a prompt."""

    def encode_chat(self, messages: list[Any]) -> list[int]:
        """Of a conversation. Raises ValueError where that cannot be written."""


class Estimate:
    """About as many ids as a tokenizer would give; they mean nothing."""

    def __init__(self) -> None:
        self.how = GIVEN

    def encode(self, text: str) -> list[int]:
        self.how = f"estimated as 1 per {CHARACTERS_PER_TOKEN} characters, so some may be longer: no tokenizer beside the model"
        return [0] * -(-len(text) // CHARACTERS_PER_TOKEN)

    def encode_chat(self, messages: list[Any]) -> list[int]:
        return self.encode(json.dumps(messages, ensure_ascii=False))


class Tokenizer:
    """The tokenizer of a checkpoint folder, loaded on first use: token ids need none."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def exists(self) -> bool:
        """Whether the folder has one."""
        return any((self._folder / name).exists() for name in TOKENIZER_FILES)

    @property
    def how(self) -> str:
        return "counted by the model's tokenizer" if "_loaded" in self.__dict__ else GIVEN

    def load(self) -> None:
        """Now, if the folder has one: before the hours of work whose results it is to write. Raises ConfigError where it is damaged."""
        if self.exists:
            self._loaded  # noqa: B018

    def encode(self, text: str) -> list[int]:
        """Token ids, with the special tokens that the tokenizer adds by itself."""
        ids: list[int] = self._loaded(text)["input_ids"]
        return ids

    def encode_chat(self, messages: list[Any]) -> list[int]:
        """Token ids of a conversation, up to where the answer begins. Raises ValueError where that cannot be written."""
        if self._loaded.chat_template is None:
            raise ValueError("the model's tokenizer has no chat template; give a prompt instead of messages")
        try:
            text = self._loaded.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # templates are programs and raise what they like
            raise ValueError(f"the chat template refuses the messages: {error}") from None
        ids: list[int] = self._loaded(text, add_special_tokens=False)["input_ids"]
        return ids

    def decode(self, prompt: list[int], tokens: list[int]) -> str:
        """The text that ``tokens`` add to a prompt."""
        context = prompt[-CONTEXT_TOKENS:]
        before: str = self._loaded.decode(context, skip_special_tokens=True)
        whole: str = self._loaded.decode(context + tokens, skip_special_tokens=True)
        if whole.startswith(before):
            return whole[len(before) :]
        alone: str = self._loaded.decode(tokens, skip_special_tokens=True)
        return alone

    @cached_property
    def _loaded(self) -> Any:
        if not self.exists:
            raise ConfigError(
                self._folder, "", 'has no tokenizer; put its files there, or give prompts as {"prompt": [token ids]}'
            )
        try:
            from transformers import AutoTokenizer  # not above: it takes seconds, and token ids need none of it
        except ImportError:
            why = 'to read text with its tokenizer takes transformers; install it, or give prompts as {"prompt": [token ids]}'
            raise ConfigError(self._folder, "", why) from None
        try:
            return AutoTokenizer.from_pretrained(self._folder, local_files_only=True)
        except Exception as error:  # the tokenizers library raises a bare Exception for a damaged file
            why = str(error).partition("\n")[0]
            raise ConfigError(self._folder, "", f"its tokenizer cannot be loaded ({why}); download it again") from error


def check_source(source: str) -> None:
    """Refuse, before any work, what ``read_requests`` cannot read. Raises ConfigError."""
    fault = EACCES if not os.access(source, os.R_OK) else EISDIR if os.path.isdir(source) else 0
    if source != "-" and fault:
        raise _unreadable(source, os.strerror(fault if os.path.exists(source) else ENOENT))


def read_requests(source: str, tokenizer: Encoder, limits: Limits) -> list[Request]:
    """The rows of a file, or of standard input for ``-``, in order. Raises ConfigError where it cannot be read or has none."""
    requests = [_request(number, row, tokenizer, limits) for number, row in _rows(source)]
    if not requests:
        raise ConfigError(source, "", "holds no prompts; give one per line")
    return requests


def read_tokens(source: str, tokenizer: Encoder, limits: Limits) -> list[list[int]]:
    """The usable prompts of a file as token ids."""
    return [request.ids for request in read_requests(source, tokenizer, limits) if not request.refused]


# ------------------------------------------------------------------------------------------------------------------ rows


def _rows(source: str) -> Iterator[tuple[int, Any]]:
    """(line number, what the line holds or a ValueError that says why it cannot be read). JSON lines are told from text by most lines."""
    try:
        raw = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    except OSError as error:
        raise _unreadable(source, str(error.strerror)) from None
    if raw.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):  # as shells of Windows write it
        raw = _transcoded(source, raw)
    lines = raw.removeprefix(BOM_UTF8).splitlines()
    begins = [line.lstrip()[:1] for line in lines if line.strip()]
    objects = source.endswith((".jsonl", ".json")) or 2 * begins.count(b"{") > len(begins)
    for number, line in enumerate(lines, 1):
        if objects and not line.strip():
            continue
        try:
            text = line.decode()
            row = json.loads(text) if objects else {"prompt": text}
            if "\\u" in text:
                json.dumps(row, ensure_ascii=False).encode()
            yield number, row
        except UnicodeDecodeError as error:
            yield number, ValueError(f"is not UTF-8 text (byte {error.start + 1})")
        except UnicodeEncodeError:
            yield (
                number,
                ValueError("has half a character: an escape that is one of a pair of surrogates, without the other"),
            )
        except RecursionError:
            yield number, ValueError("is nested too deeply")
        except ValueError as error:
            yield number, ValueError(f"is not JSON: {error}")


def _transcoded(source: str, raw: bytes) -> bytes:
    try:
        return raw.decode("utf-16").encode()
    except UnicodeDecodeError as error:
        raise _unreadable(source, f"it begins as UTF-16 text but is none from byte {error.start + 1} on") from None


def _unreadable(source: str, why: str) -> ConfigError:
    return ConfigError(source, "", f"cannot be read ({why}); name a file of prompts, or - for standard input")


def _request(number: int, row: Any, tokenizer: Encoder, limits: Limits) -> Request:
    request = Request(number, f"line-{number}")
    try:
        if isinstance(row, ValueError):
            raise row
        if not isinstance(row, dict):
            raise ValueError("is not an object with a prompt: one per line")
        if "custom_id" in row:
            if not isinstance(row["custom_id"], str):
                raise ValueError(f"custom_id is {row['custom_id']!r}, not text")
            request.custom_id = row["custom_id"]
        body = row.get("body", row)
        if not isinstance(body, dict):
            raise ValueError("body is not an object")
        request.chat = "messages" in body
        _check_supported(body)
        request.new_tokens = _new_tokens(body, limits)
        request.ids = _ids(body, tokenizer, limits)
    except ValueError as error:
        request.refused = f"line {number}: {error}"
    return request


def _check_supported(body: dict[str, Any]) -> None:
    for name, neutral in _UNSUPPORTED.items():
        if (value := body.get(name)) and value != neutral:
            instead = f"leave it out or make it {neutral}" if neutral else "leave it out"
            raise ValueError(f"{name} is {value!r}, which is not supported (the likeliest token is taken); {instead}")


def _new_tokens(body: dict[str, Any], limits: Limits) -> int:
    names = ("max_completion_tokens", "max_tokens")
    name, value = next(((n, body[n]) for n in names if body.get(n) is not None), ("", limits.new_tokens))
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} is {value!r}, not a positive number")
    if value > limits.gen_len:
        raise ValueError(f"{name} is {value:,}, of which {limits.gen_len:,} are taken{limits.mend('--gen-len', value)}")
    return value


def _message(number: int, message: Any) -> dict[str, Any]:
    """With its content as one text. Raises ValueError where it has other content."""
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ValueError(f"the content of message {number + 1} is not text")
    return {**message, "content": content}


def _ids(body: dict[str, Any], tokenizer: Encoder, limits: Limits) -> list[int]:
    prompt = body.get("messages", body.get("prompt"))
    if prompt is None:
        raise ValueError("has neither prompt nor messages")
    if "messages" in body and "prompt" in body:
        raise ValueError("has both prompt and messages; leave one out")
    if not prompt:
        raise ValueError("the prompt is empty")
    if "messages" in body:
        if not isinstance(prompt, list):
            raise ValueError("messages is not a list")
        ids = tokenizer.encode_chat([_message(number, message) for number, message in enumerate(prompt)])
    elif isinstance(prompt, str):
        ids = tokenizer.encode(prompt)
    elif isinstance(prompt, list) and all(type(token) is int for token in prompt):
        ids = prompt
    else:
        raise ValueError("prompt is neither text nor a list of token ids")
    if not ids:
        raise ValueError("the prompt is empty")
    if odd := next((token for token in ids if not 0 <= token < limits.vocabulary), None):
        raise ValueError(f"token id {odd} is not one of the model's 0 to {limits.vocabulary - 1:,}")
    if len(ids) > limits.prompt_len:
        raise ValueError(
            f"the prompt has {len(ids):,} tokens, of which {limits.prompt_len:,} are taken"
            f"{limits.mend('--prompt-len', len(ids))}"
        )
    return ids
