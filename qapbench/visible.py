"""Makes characters visible that a screen would obey or hide: escape sequences, NUL, overrides of the text direction."""

from __future__ import annotations

import logging
import re

HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad"  # control characters but tab and new line, and the soft hyphen
    "\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"  # direction, width zero
    "\u2028\u2029\ud800-\udfff\U000e0000-\U000e007f]"  # line separators, halves of characters, tags
)
"""What Unicode lets a text do without being seen. Joiners are not among it, since scripts and emoji need them."""


def visible(text: str) -> str:
    """The text with every hidden character written as its escape, such as `\\x1b` or `\\u202e`."""
    return HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def json_visible(dumped: str) -> str:
    """JSON in which hidden characters stand as JSON escapes, so that it reads back to the same data."""
    return HIDDEN.sub(_json_escape, dumped)


def visible_logger(name: str) -> logging.Logger:
    """The logger with that name, made to write hidden characters escaped: its messages hold names of records."""
    found = logging.getLogger(name)
    found.addFilter(_made_visible)
    return found


def _made_visible(record: logging.LogRecord) -> bool:
    record.msg, record.args = visible(record.getMessage()), ()
    return True


def _json_escape(found: re.Match[str]) -> str:
    units = found[0].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2))
