"""Keeps secrets out of what a run prints and writes: a recipe may name storage by an URL that holds the key to it."""

from __future__ import annotations

import re
from typing import Any

HIDDEN = "***"
_SECRET = r"(?:token|secret|passw(?:or)?d|passphrase|(?:api|access|private)[-_]?key|credential|signature)"
_SECRET_NAME = re.compile(_SECRET, re.IGNORECASE)
# One slash is what pathlib leaves of two. With a colon the user info ends at the last @ of the word: a password may hold any other sign.
_USER_INFO = re.compile(r"([a-z][a-z0-9+.-]*:/{1,2})(?:[^/\s:@]*:\S*|[^/\s?#]*)@", re.IGNORECASE)
_ASSIGNED = re.compile(rf"((?:(?<![\w.-])[\w.-]*{_SECRET}[\w.-]*|(?<=[?&;#])(?:sig|key|auth))=)[^&;#\s\"']+", re.IGNORECASE)


def redact(value: Any, key: str = "") -> Any:
    """A copy of a JSON value, or of a text, in which secrets are ``***``.

    Those are: what stands under a key whose name says so (token, secret, password, api_key, credential, ...), whatever it is; in every text
    the user info of URLs, and what is assigned to such a name, as in their queries (``?X-Amz-Signature=...``). A secret under a harmless
    name is not known for one.

    Args:
        key: the name that ``value`` stands under.
    """
    if value is not None and _SECRET_NAME.search(key):
        return HIDDEN
    if isinstance(value, dict):
        return {name: redact(item, str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    if isinstance(value, str):
        return _ASSIGNED.sub(rf"\1{HIDDEN}", _USER_INFO.sub(rf"\1{HIDDEN}@", value))
    return value
