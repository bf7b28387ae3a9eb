"""API keys: who may do what. The file holds their SHA-256 alone; `python -m serving.keys NAME SCOPE...` makes one."""

import hashlib
import hmac
import secrets
import sys
from pathlib import Path
from typing import Annotated, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from raresynth.errors import ParamsError

Scope = Literal["predict", "generate", "admin"]


class Key(BaseModel):
    """One key of the file, whose name stands before it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    scopes: frozenset[Scope]


class Keys:
    """The keys of a file."""

    def __init__(self, path: Path) -> None:
        """Read a file.

        Raises:
            ParamsError: it is no file of keys, or holds none.
        """
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
            self._keys = TypeAdapter(dict[str, Key]).validate_python(content)
        except (OSError, UnicodeDecodeError, yaml.YAMLError, ValidationError) as error:
            raise ParamsError(f"{path} is no file of API keys; make entries with `python -m serving.keys`") from error
        if not self._keys:
            raise ParamsError(f"{path} holds no API key; make one with `python -m serving.keys`")

    def find(self, presented: str) -> tuple[str, frozenset[Scope]] | None:
        """Name and scopes of a key; None if it is unknown. Takes equally long whichever key is tried."""
        digest = _digest(presented)
        found = None
        for name, key in self._keys.items():
            if hmac.compare_digest(digest, key.sha256):
                found = name, key.scopes
        return found


def _digest(key: str) -> str:
    # Keys are 256 random bits, so that a plain hash cannot be searched.
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def main(arguments: list[str]) -> int:
    """Print a new key, and the entry for it."""
    scopes = get_args(Scope)
    if len(arguments) < 2 or not set(arguments[1:]) <= set(scopes):
        print(f"usage: python -m serving.keys NAME SCOPE... (scopes: {', '.join(scopes)})", file=sys.stderr)
        return 2
    name, *asked = arguments
    key = secrets.token_urlsafe(32)
    print(f"The key, shown this once: {key}\nIts entry for the file that keys_file names:", file=sys.stderr)
    print(yaml.safe_dump({name: {"sha256": _digest(key), "scopes": sorted(set(asked))}}, sort_keys=False), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
