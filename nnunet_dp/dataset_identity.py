"""A dataset's identity: two models of one dataset can be told to be that by its owner, and by nobody else.

A secret beside the ledger, made once, never exported. What is released is an HMAC under it of the ledger's digest of
the table of units: without the secret it confirms no guess about cases or patients.

    privacy_identity.key       the secret
    privacy_identity.sha256    its digest: a secret that is lost is missed, and not replaced by another

The digest of 32 random bytes tells nothing of them; it stays beside them all the same.

Formal guarantee:
    Without the secret the identity is a pseudo-random function of the dataset (HMAC-SHA256, RFC 2104): it is equal for
    all exports from one folder, and tells nothing else.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

from nnunet_dp.errors import Refusal
from nnunet_dp.replacing import replacing, sync_folder

SECRET, DIGEST = "privacy_identity.key", "privacy_identity.sha256"
_BYTES = 32
_PURPOSE = b"nnunet_dp dataset identity 1\0"


def identity(folder: Path, units: str) -> str:
    """The dataset's identity, hex.

    Args:
        folder: that holds the ledger; the secret is made there if there never was one.
        units: the ledger's digest of the table of units.

    Raises:
        Refusal: for a secret that is lost, that others may read, or that is damaged.
    """
    file = Path(folder) / SECRET
    if not file.exists():
        _refuse_lost(file)
        _make(file)
    if stat.S_IMODE(file.stat().st_mode) & 0o077:
        raise Refusal(f"{SECRET} in {file.parent.name} should be readable by its owner alone: type chmod 600 for it")
    secret = file.read_bytes()
    if len(secret) != _BYTES:
        raise Refusal(f"{SECRET} in {file.parent.name} should hold {_BYTES} bytes, found {len(secret)}: put it back")
    _refuse_other(file, hashlib.sha256(secret).hexdigest())
    return hmac.new(secret, _PURPOSE + units.encode(), hashlib.sha256).hexdigest()


def _refuse_lost(file: Path) -> None:
    if file.with_name(DIGEST).exists():
        raise Refusal(
            f"{SECRET} in {file.parent.name} is lost, and earlier exports carry the identity that it makes: put it "
            f"back from a backup; or delete {DIGEST}, and new exports carry another identity, by which nobody can tell "
            "that they are of the same patients"
        )


def _refuse_other(file: Path, digest: str) -> None:
    """Refuse a secret that is not the first one, whose digest is noted."""
    noted = file.with_name(DIGEST)
    if not noted.exists():
        with replacing(noted) as stream:
            stream.write(f"{digest}\n".encode())
    elif noted.read_text().strip() != digest:
        raise Refusal(f"{SECRET} in {file.parent.name} is another one than {DIGEST} says: put the first one back")


def _make(file: Path) -> None:
    """Whole or not at all; of several processes the first one wins."""
    temporary = file.with_name(f".{SECRET}.{secrets.token_hex(8)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(secrets.token_bytes(_BYTES))
            stream.flush()
            os.fsync(stream.fileno())
        with suppress(FileExistsError):
            os.link(temporary, file)
    finally:
        temporary.unlink()
    sync_folder(file)
