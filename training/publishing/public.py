"""Removes local paths and secrets from everything that is published: cards, results and configurations.

Paths become relative to the working directory, or are reduced to their last part; URLs lose user, password, query,
and hosts in private networks; tokens are removed. Files of a run that stay on the machine are not changed.
"""

import ipaddress
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

LEFT_OUT = "(left out)"
# keys whose value is a secret; pad_token, mask_token and the like do not match
SECRET = re.compile(
    r"(?:.*_)?(?:password|passwd|passphrase|secret|credentials?|(?:api|access|private|account|secret)_?key)(?:_id)?"
    r"|(?:(?:hf|hub|auth|access|api|bearer|session|use_auth)_?)?token|key",
    re.IGNORECASE,
)
# patterns of tokens of the Hub, GitHub, AWS, OpenAI, Slack and Google, and of JSON web tokens
TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|AKIA[0-9A-Z]{16}|sk-[\w-]{20,}"
    r"|xox[abprs]-[\w-]{10,}|AIza[\w-]{30,}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*|Bearer\s+\S{8,})"
)
ADDRESS = re.compile(r"(?<![A-Za-z0-9+.-])([A-Za-z][A-Za-z0-9+.-]*)://([^\s\"'<>]+)")
REMOTE = re.compile(r"(?<![\w.+-])[\w.+-]+@[\w.-]+:[/~][^\s\"'<>]*")  # as for scp and rsync
POSIX = re.compile(r"(?<![\w/.~{}-])(?:~[\w.-]*)?/(?:[^\s/\"'<>|,;()\[\]]+/)+[^\s\"'<>|,;()\[\]]*")
WINDOWS = re.compile(r"(?:\b[A-Za-z]:[\\/]|\\\\)[^\s\"'<>|,;]*[\\/]?[^\s\"'<>|,;]*")
# schemes whose authority is a bucket or an organisation, and schemes of public hosts
STORES = {"hf", "s3", "gs", "gcs", "az", "abfs", "abfss", "r2", "oss", "cos"}
WEB = {"http", "https", "ftp", "ftps"}
PRIVATE_SUFFIXES = (".local", ".lan", ".internal", ".intranet", ".corp", ".home", ".localdomain")


def plain(value: Any) -> Any:
    """
    `value` in a form that JSON and YAML can hold and that may be published: one-element tensors and arrays become
    numbers, NaN becomes None, and local paths and secrets are removed.
    """
    if isinstance(value, Mapping):
        return {public_text(str(key)): _of_key(str(key), item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(item) for item in value]

    # scalars of numpy and torch; an array of several numbers raises here
    if hasattr(value, "item") and getattr(value, "size", None) is not None and not isinstance(value, (int, float)):
        value = value.item()

    # JSON has no NaN
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (bool, int, float, type(None))) else public_text(str(value))


def _of_key(key: str, value: Any) -> Any:
    return LEFT_OUT if isinstance(value, str) and value and SECRET.fullmatch(key) else plain(value)


def public_text(text: str) -> str:
    """`text` without absolute paths, credentials and tokens."""
    # a text that is just a path may contain spaces
    if "\n" not in text and "://" not in text and _is_elsewhere(text):
        return _last_parts(text)

    # otherwise each match is replaced; first the home and working directory, which may contain spaces
    text = TOKEN.sub(LEFT_OUT, text)
    text = ADDRESS.sub(lambda found: _address(found[1].lower(), found[2]), text)
    text = REMOTE.sub(lambda found: _last_parts(found[0].partition(":")[2]), text)
    for place in sorted({str(Path.home()), os.getcwd()} - {"/"}, key=len, reverse=True):
        text = re.sub(rf"(?<![\w/]){re.escape(place)}(?=/)", "~", text)
    text = WINDOWS.sub(lambda found: _last_parts(found[0]), text)
    return POSIX.sub(lambda found: _last_parts(found[0]), text)


def _is_elsewhere(text: str) -> bool:
    """Whether `text` is a path that is absolute, in a home, or outside the working directory."""
    return re.match(r"~[\w.-]*/|\.\.[\\/]|\\\\|/[^/\s]|[A-Za-z]:[\\/]", text) is not None


def _last_parts(text: str) -> str:
    """A path relative to the working directory if it is inside, else its last part."""
    if re.match(r"[A-Za-z]:[\\/]|\\\\|\.\.\\", text):
        return PureWindowsPath(text).name or LEFT_OUT
    path = PurePosixPath(os.path.normpath(text))

    # if the working directory contains the home, a relative path would reveal it
    here = PurePosixPath(os.getcwd())
    if here not in (home := PurePosixPath(Path.home()), *home.parents) and path.is_relative_to(here):
        return path.relative_to(here).as_posix()

    # the last part of a home is a user name
    if path == home or path.parent.as_posix() in ("/home", "/Users"):
        return "~"
    return path.name or LEFT_OUT


def _address(scheme: str, rest: str) -> str:
    # queries may contain signatures, and passwords stand before the host; a password may contain a slash
    authority, slash, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    authority = authority.rpartition("@")[2]
    if not re.fullmatch(r"[^:]*(?::\d*)?|\[.*\](?::\d*)?", authority):
        authority, slash, path = path.rpartition("@")[2].partition("/")
    if scheme in STORES or (scheme in WEB and _is_reachable(authority)):
        return f"{scheme}://{authority}{slash}{path}"
    return PurePosixPath(path).name or LEFT_OUT


def _is_reachable(authority: str) -> bool:
    host = re.sub(r":\d*$", "", authority).strip("[]").lower()
    try:
        return ipaddress.ip_address(host).is_global
    except ValueError:
        return "." in host and not host.endswith(PRIVATE_SUFFIXES)
