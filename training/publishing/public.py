"""What may leave the machine: the one gate of all that cards, results and configurations state.

Paths become relative to the working directory, or their last part; addresses lose user, password, query, and hosts of
private networks; tokens go. What stands in the files of a run that stay on the machine is not touched.
"""

import ipaddress
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

LEFT_OUT = "(left out)"
# keys whose text is a secret; pad_token, mask_token and their like are not among them
SECRET = re.compile(
    r"(?:.*_)?(?:password|passwd|passphrase|secret|credentials?|(?:api|access|private|account|secret)_?key)(?:_id)?"
    r"|(?:(?:hf|hub|auth|access|api|bearer|session|use_auth)_?)?token|key",
    re.IGNORECASE,
)
# shapes by which tokens of the Hub, GitHub, AWS, OpenAI, Slack, Google and JSON web tokens are known
TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|AKIA[0-9A-Z]{16}|sk-[\w-]{20,}"
    r"|xox[abprs]-[\w-]{10,}|AIza[\w-]{30,}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*|Bearer\s+\S{8,})"
)
ADDRESS = re.compile(r"(?<![A-Za-z0-9+.-])([A-Za-z][A-Za-z0-9+.-]*)://([^\s\"'<>]+)")
REMOTE = re.compile(r"(?<![\w.+-])[\w.+-]+@[\w.-]+:[/~][^\s\"'<>]*")  # of scp and rsync
POSIX = re.compile(r"(?<![\w/.~{}-])(?:~[\w.-]*)?/(?:[^\s/\"'<>|,;()\[\]]+/)+[^\s\"'<>|,;()\[\]]*")
WINDOWS = re.compile(r"(?:\b[A-Za-z]:[\\/]|\\\\)[^\s\"'<>|,;]*[\\/]?[^\s\"'<>|,;]*")
# schemes whose authority is a bucket or an organisation, and those whose host the world can reach
STORES = {"hf", "s3", "gs", "gcs", "az", "abfs", "abfss", "r2", "oss", "cos"}
WEB = {"http", "https", "ftp", "ftps"}
PRIVATE_SUFFIXES = (".local", ".lan", ".internal", ".intranet", ".corp", ".home", ".localdomain")


def plain(value: Any) -> Any:
    """
    `value` as JSON and YAML can hold it, and as may be published: tensors and arrays of one number become numbers,
    NaN becomes None, and no text names a place of this machine or a secret.
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
    # a path as a whole may hold spaces
    if "\n" not in text and "://" not in text and _is_elsewhere(text):
        return _last_parts(text)

    # else each in its place; the known ones first, which may hold spaces too
    text = TOKEN.sub(LEFT_OUT, text)
    text = ADDRESS.sub(lambda found: _address(found[1].lower(), found[2]), text)
    text = REMOTE.sub(lambda found: _last_parts(found[0].partition(":")[2]), text)
    for place in sorted({str(Path.home()), os.getcwd()} - {"/"}, key=len, reverse=True):
        text = re.sub(rf"(?<![\w/]){re.escape(place)}(?=/)", "~", text)
    text = WINDOWS.sub(lambda found: _last_parts(found[0]), text)
    return POSIX.sub(lambda found: _last_parts(found[0]), text)


def _is_elsewhere(text: str) -> bool:
    """Whether `text` is a path that is absolute, of a home, or leads out of the working directory."""
    return re.match(r"~[\w.-]*/|\.\.[\\/]|\\\\|/[^/\s]|[A-Za-z]:[\\/]", text) is not None


def _last_parts(text: str) -> str:
    """A path below the working directory as seen from there, the last part of any other."""
    if re.match(r"[A-Za-z]:[\\/]|\\\\|\.\.\\", text):
        return PureWindowsPath(text).name or LEFT_OUT
    path = PurePosixPath(os.path.normpath(text))

    # a working directory that holds the home would show all of it
    here = PurePosixPath(os.getcwd())
    if here not in (home := PurePosixPath(Path.home()), *home.parents) and path.is_relative_to(here):
        return path.relative_to(here).as_posix()

    # the last part of a home is somebody's name
    if path == home or path.parent.as_posix() in ("/home", "/Users"):
        return "~"
    return path.name or LEFT_OUT


def _address(scheme: str, rest: str) -> str:
    # signatures stand in the query, passwords before the host; one with a slash in it is no port
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
