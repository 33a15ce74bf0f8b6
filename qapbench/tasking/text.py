"""Keeps the text of users text: special tokens that it spells are tokenized like any other characters.

A prompt is one string, in which the chat template writes special tokens and users write questions and choices. What a
user wrote is therefore marked before the template is applied: `quoted` puts the character QUOTE after the first
character of every special token that it spells. A prompt without QUOTE is tokenized as ever. One with QUOTE goes
through a copy of the tokenizer in which special tokens have a spelling that the text does not contain, so that
everything else is split and merged as the tokenizer splits and merges text.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from qapbench.errors import UserError

QUOTE = "\ufdd0"
"""A code point that Unicode reserves for use inside a program. In a user's text it has no meaning and is dropped."""
MASK = "\ufdd1"
"""Another one. Runs of it stand before special tokens in the copy of a tokenizer."""


def special_tokens(processor: Any) -> frozenset[str]:
    """The spellings that must not come of a user's text: special tokens, and placeholders of images and videos.

    Other added tokens are part of the vocabulary of texts.

    Args:
        processor: the model's processor.
    """
    added = processor.tokenizer.added_tokens_decoder.values()
    # A processor looks for its placeholders whether or not the tokenizer knows them.
    own = {value for name, value in vars(processor).items() if name.endswith("_token") and isinstance(value, str)}
    return frozenset(own | {str(token.content) for token in added if token.special})


def quoted(parts: Sequence[str], special: Iterable[str], fixed: int = 0) -> list[str]:
    """Texts of a user with QUOTE in every special token that they spell, in one part or across several.

    Args:
        parts: texts that may end up side by side.
        special: spellings of the special tokens.
        fixed: length of a beginning of the texts that is part of a prompt already. Only tokens that reach beyond it
            are marked.
    """
    whole = "".join(parts)
    found = [match for match in _anywhere(frozenset(special)).finditer(whole) if match.end(1) > fixed]
    if not found:
        return list(parts)
    places = {match.start() + 1 for match in found}
    made, at = [], 0
    for part in parts:
        cuts = sorted(place - at for place in places if at < place <= at + len(part))
        ends = [0, *cuts, len(part)]
        made.append(QUOTE.join(part[start:stop] for start, stop in itertools.pairwise(ends)))
        at += len(part)
    return made


def unquoted(text: str) -> str:
    """The text as its user wrote it."""
    return text.replace(QUOTE, "")


def quote_last(prompt: str, token: str, keep: int) -> str:
    """A prompt in which only the first occurrences of a token stay special.

    Args:
        prompt: the prompt.
        token: the token.
        keep: number of occurrences that stay.
    """
    first, *rest = prompt.split(token)
    literal = token[0] + QUOTE + token[1:]
    return first + "".join((token if index < keep else literal) + part for index, part in enumerate(rest))


def literally(processor: Any, prompt: str) -> tuple[Any, str]:
    """A processor and a spelling of a prompt that make special tokens of no marked text.

    Both are the given ones if nothing is marked.

    Args:
        processor: the model's processor.
        prompt: the prompt.

    Raises:
        UserError: the tokenizer cannot be copied in this way.
    """
    if QUOTE not in prompt:
        return processor, prompt
    mask = MASK * (1 + max(map(len, re.findall(f"{MASK}*", prompt))))
    masked = _anywhere_once(special_tokens(processor)).sub(lambda match: mask + match[0], prompt)
    return _masked(processor, mask), unquoted(masked)


@functools.lru_cache(maxsize=32)
def _anywhere(special: frozenset[str]) -> re.Pattern[str]:
    """Matches, without length, where a token begins; group 1 is the longest. Tokens that overlap are found too."""
    return re.compile(f"(?=({_any_of(special)}))")


@functools.lru_cache(maxsize=32)
def _anywhere_once(special: frozenset[str]) -> re.Pattern[str]:
    """Matches tokens one after the other as tokenizers find them: the leftmost first, of these the longest."""
    return re.compile(_any_of(special))


def _any_of(special: frozenset[str]) -> str:
    longest = sorted(special, key=lambda token: (-len(token), token))
    # QUOTE inside a token breaks its spelling, except that of a single character.
    tokens = [re.escape(token) + (f"(?!{QUOTE})" if len(token) == 1 else "") for token in longest if token]
    return "|".join(tokens) or "(?!)"


@functools.lru_cache(maxsize=4)
def _masked(processor: Any, mask: str) -> Any:
    """A copy of a processor whose special tokens are spelled with `mask` in front.

    Raises:
        UserError: its tokenizer cannot be copied in this way.
    """
    special = special_tokens(processor)
    made = copy.copy(processor)
    made.tokenizer = _masked_tokenizer(processor.tokenizer, special, mask)
    for name, value in vars(processor).items():
        if isinstance(value, str) and value in special:
            setattr(made, name, mask + value)
        elif isinstance(value, re.Pattern):  # InternVL's processor looks for its placeholders by such a pattern
            pattern = value.pattern
            for token in sorted(special & {processor.image_token, getattr(processor, "video_token", "")}):
                spelled = re.escape(token)  # "<video>" is also the end of the group's name, "(?P<video>"
                pattern = re.sub(rf"(?<!\?P){re.escape(spelled)}", lambda match: mask + match[0], pattern)
            setattr(made, name, re.compile(pattern))
    if (write := getattr(made, "replace_image_token", None)) is not None:

        def replace_image_token(*args: Any, **kwargs: Any) -> str:
            """What the processor writes for an image, whose special tokens may be no attributes (`<row_1_col_1>`)."""
            own = write(*args, **kwargs).replace(mask, "")
            return _anywhere_once(special).sub(lambda match: mask + match[0], own)

        made.replace_image_token = replace_image_token
    return made


def _masked_tokenizer(tokenizer: Any, special: frozenset[str], mask: str) -> Any:
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        name = type(tokenizer).__name__
        raise UserError(
            f"model: a question spells a special token, and the slow tokenizer {name} cannot read it as text"
        )
    data = json.loads(backend.to_str())

    def spelled(token: str) -> str:
        return mask + token if token in special else token

    for token in data["added_tokens"]:
        token["content"] = spelled(token["content"])
    model = data["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {spelled(token): index for token, index in model["vocab"].items()}
    else:
        model["vocab"] = [[spelled(token), score] for token, score in model["vocab"]]
    if model.get("unk_token"):
        model["unk_token"] = spelled(model["unk_token"])
    if "merges" in model:
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = [pair for pair in pairs if not {*pair, "".join(pair)} & special]
    made = copy.copy(tokenizer)
    made._tokenizer = Tokenizer.from_str(json.dumps(data))
    # A processor asks for its tokens by name, too (`image_token_id`).
    named = tokenizer._special_tokens_map.items()
    made._special_tokens_map = {name: spelled(str(token)) if token is not None else None for name, token in named}
    for token in special:
        if made._tokenizer.token_to_id(mask + token) != backend.token_to_id(token):
            raise UserError(f"model: a question spells {token!r}, which this tokenizer cannot read as text")
    return made
