"""The key of an endpoint: read it, keep it off unsafe addresses, remove it from replies."""

import ipaddress
import os
import re
from urllib.parse import urlsplit

from sae_lightning.errors import UserError

DEFAULT_KEY_ENV = "OPENAI_API_KEY"
MIN_KEY_PART = 8  # parts of the key that are at least this long are censored
# One character of a text: as it is, URL-encoded (even repeatedly) or JSON-escaped.
ENCODED_CHARACTER = re.compile(r"%(?:25)*[0-9a-f]{2}|\\u00[0-9a-f]{2}|.", re.DOTALL | re.IGNORECASE)
# What a server writes in place of the middle of a key.
MASK = r"(?:[*•●]{2,}|…+|[.x]{3,})"


def read_key(name: str | None) -> str:
    """Read the key in the environment variable `name`; empty if there is none. UserError if it has
    characters that no key has."""
    key = os.environ.get(name, "").strip() if name else ""
    if not (key.isascii() and key.isprintable()):
        # refused here, because the HTTP client's error would quote the key
        raise UserError(f"key_env={name}: holds characters that no key has; set it again")
    return key


def check_url(url: str, key: str) -> bool:
    """Check the web address of an endpoint, and return whether it is on this machine.

    UserError if `url` is no web address, holds a secret, or would get the key unencrypted.
    """
    try:
        parts = urlsplit(url)
        scheme, host = parts.scheme, parts.hostname
        _ = parts.port  # ValueError if it is impossible
    except ValueError:
        scheme = host = None
    else:
        if parts.username or parts.password or parts.query or parts.fragment:
            # not quoted: it may be a secret
            raise UserError(
                "endpoint: the address holds a user name, a password or a query; put the key into "
                "an environment variable and give its name as key_env"
            )
    if scheme not in ("http", "https") or not host or not url.isprintable():
        raise UserError(
            f"endpoint={url}: give a web address such as http://localhost:8000/v1 or "
            "https://api.openai.com/v1"
        )
    is_local = _is_loopback(host)
    if key and scheme != "https" and not is_local:
        raise UserError(
            f"endpoint={url}: would get the key unencrypted; use https, a tunnel (ssh -L) to "
            "http://localhost:..., or key_env=null to send none"
        )
    return is_local


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def censor(text: str, key: str) -> str:
    """Replace the key in `text` by ***: all or part of it, also URL-encoded or JSON-escaped, or its
    ends around a mask (`sk-ab****yz`)."""
    if len(key) <= 3:  # too short to be a secret
        return text
    if len(key) < MIN_KEY_PART:  # a placeholder such as `none`, censored as a whole word only
        return re.sub(rf"(?<!\w){re.escape(key)}(?!\w)", "***", text)
    characters = ENCODED_CHARACTER.findall(text)
    plain = "".join(c if len(c) == 1 else chr(int(c[-2:], 16)) for c in characters)
    for start in range(len(plain) - MIN_KEY_PART + 1):
        if plain[start : start + MIN_KEY_PART] in key:
            characters[start : start + MIN_KEY_PART] = ["\0"] * MIN_KEY_PART  # marks
    text = re.sub("\0+", "***", "".join(characters))
    # beginnings and ends of the key, the longest first, that are too short to be censored alone
    lengths = range(MIN_KEY_PART - 1, 2, -1)  # 7 to 3 characters
    beginnings = "|".join(re.escape(key[:n]) for n in lengths)
    ends = "|".join(re.escape(key[-n:]) for n in lengths)
    masked = rf"(?:{beginnings}){MASK}(?:{ends})?|{MASK}(?:{ends})"
    return re.sub(masked, "***", text, flags=re.IGNORECASE)
