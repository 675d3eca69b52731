"""Whether the server binary is the one that was installed, and who else could change it.

An installer writes down each file of a wheel, with size and SHA-256, in the wheel's RECORD.

Contract: :func:`examine` looks and touches nothing, and never raises for what it finds:
every doubt has a :class:`Verdict`. What RECORD says, what that means for a file, and whether
a mode lets others write, is decided by functions without I/O. Blocks: it reads the whole
binary, a block at a time.

What it cannot tell: who may write the binary may write RECORD too, as a rule. It finds
damage, half an update, and a binary that was replaced; not an intruder who is this user.
"""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import io
import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Final

__all__ = [
    "DamagedRecordError",
    "Entry",
    "Fingerprint",
    "Provenance",
    "Verdict",
    "entry_of",
    "examine",
    "judge",
    "who_else_may_write",
]

DISTRIBUTION: Final = "stepflow-orchestrator"

_SHA256: Final = "sha256"
_MOST_LINKS: Final = 40  # the kernel's own limit


class Verdict(Enum):
    """What is known of a binary."""

    MATCHES = "matches"
    """It is what RECORD names."""
    DIFFERS = "differs"
    """RECORD names it with another size or hash: it was modified, or is damaged."""
    UNRECORDED = "unrecorded"
    """It lies in the package, and no RECORD vouches for it."""
    ELSEWHERE = "elsewhere"
    """It was chosen, and comes from no wheel."""
    DAMAGED_RECORD = "damaged record"
    """There is a RECORD that cannot be read."""
    UNREADABLE = "unreadable"
    """This user cannot read it."""


class DamagedRecordError(Exception):
    """A RECORD is not what the specification of wheels says."""


@dataclass(frozen=True)
class Entry:
    """What a RECORD says of a file.

    :ivar sha256: in hexadecimal digits; None if it names no hash, or another one
    :ivar size: in bytes; None if it names none
    """

    sha256: str | None
    size: int | None


@dataclass(frozen=True)
class Fingerprint:
    """What a file is.

    :ivar sha256: in hexadecimal digits
    :ivar size: in bytes
    """

    sha256: str
    size: int


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What was found out about a binary.

    :ivar reason: the verdict in words, a clause
    :ivar found: what the file is; None if it cannot be read
    :ivar recorded: what RECORD says; None if it does not name the file
    :ivar target: where the file is, if its path is a symbolic link
    :ivar writers: who else may replace it: a clause for each place
    """

    binary: Path
    verdict: Verdict
    reason: str
    found: Fingerprint | None = None
    recorded: Entry | None = None
    target: Path | None = None
    writers: tuple[str, ...] = ()


def examine(binary: Path, *, chosen: bool = False) -> Provenance:
    """Look at a binary and at the RECORD that may name it. Blocks.

    :param binary: its absolute path, as it would be started
    :param chosen: whether it was named, and not looked up in the package
    """
    recorded, found = None, None
    try:
        recorded = _recorded(binary)
        found = fingerprint(binary)
    except DamagedRecordError as exc:
        verdict, reason = Verdict.DAMAGED_RECORD, str(exc)
    except OSError as exc:
        verdict, reason = Verdict.UNREADABLE, f"it cannot be read: {exc.strerror}"
    else:
        verdict, reason = judge(found, recorded, chosen=chosen)
    return Provenance(
        binary=binary,
        verdict=verdict,
        reason=reason,
        found=found,
        recorded=recorded,
        target=Path(os.path.realpath(binary)) if binary.is_symlink() else None,
        writers=tuple(who_else_may_write(binary)),
    )


def judge(
    found: Fingerprint, recorded: Entry | None, *, chosen: bool
) -> tuple[Verdict, str]:
    """Pure: what to make of a file and its entry, and why."""
    if recorded is None and chosen:
        return Verdict.ELSEWHERE, "it was chosen, and no wheel's RECORD names it"
    if recorded is None:
        return Verdict.UNRECORDED, f"no RECORD of {DISTRIBUTION} names it"
    if recorded.size not in (None, found.size):
        sizes = f"it has {found.size} bytes, and RECORD says {recorded.size}"
        return Verdict.DIFFERS, sizes
    if recorded.sha256 is None:
        return Verdict.UNRECORDED, f"RECORD names it without a hash of {_SHA256}"
    if recorded.sha256 != found.sha256:
        return Verdict.DIFFERS, "it has the size, but not the hash that RECORD says"
    return Verdict.MATCHES, f"it is the one in the RECORD of {DISTRIBUTION}"


def fingerprint(path: Path) -> Fingerprint:
    """Read a file through. Blocks.

    :raises OSError: if it cannot be read
    """
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, _SHA256)
        return Fingerprint(digest.hexdigest(), file.tell())


# -- RECORD ----------------------------------------------------------------------------


def _recorded(binary: Path) -> Entry | None:
    """What the RECORD that names a binary says of it; None if there is none.

    :raises DamagedRecordError: if it cannot be read
    """
    places = [binary, Path(os.path.realpath(binary))]
    for distribution in distributions(name=DISTRIBUTION):
        entry = entry_of(_record(distribution), _is_one_of(places, distribution))
        if entry is not None:
            return entry
    return None


def _record(distribution: Distribution) -> str:
    try:
        return distribution.read_text("RECORD") or ""
    except (OSError, UnicodeDecodeError) as exc:
        raise DamagedRecordError(f"RECORD cannot be read: {exc}") from exc


def _is_one_of(
    places: Iterable[Path], distribution: Distribution
) -> Callable[[str], bool]:
    """Whether a name in a RECORD is that of a file: whichever way leads to its directory."""

    def is_it(name: str) -> bool:
        named = Path(str(distribution.locate_file(name)))
        return any(
            named.name == place.name and _is_same(named.parent, place.parent)
            for place in places
        )

    return is_it


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except (OSError, ValueError):
        return False


def entry_of(record: str, is_it: Callable[[str], bool]) -> Entry | None:
    """Pure: what a RECORD says of a file; None if it does not name it.

    :param is_it: whether a name in it is that of the file
    :raises DamagedRecordError: if that cannot be told
    """
    rows = list(_rows(record))
    entries = {_entry(row) for row in rows if is_it(row[0])}
    if len(entries) > 1:
        raise DamagedRecordError("RECORD names it more than once, and not alike")
    if not entries and any(len(row) != 3 for row in rows):
        raise DamagedRecordError("RECORD is damaged, and does not name it")
    return next(iter(entries), None)


def _rows(record: str) -> Iterator[list[str]]:
    try:
        yield from filter(None, csv.reader(io.StringIO(record, newline="")))
    except csv.Error as exc:
        raise DamagedRecordError(f"RECORD is damaged: {exc}") from exc


def _entry(row: list[str]) -> Entry:
    try:
        _, hashed, size = row
        return Entry(_sha256(hashed), int(size) if size else None)
    except ValueError as exc:
        raise DamagedRecordError("what RECORD says of it is damaged") from exc


def _sha256(hashed: str) -> str | None:
    """From ``sha256=`` and 32 bytes in base64, as URLs have it and without its padding."""
    kind, _, encoded = hashed.partition("=")
    if kind != _SHA256:
        return None
    try:
        digest = base64.b64decode(encoded + "=", altchars=b"-_", validate=True)
    except binascii.Error as exc:
        raise ValueError("not base64") from exc
    if len(digest) != hashlib.sha256().digest_size:
        raise ValueError("not 32 bytes")
    return digest.hex()


# -- who may write it ------------------------------------------------------------------


def who_else_may_write(path: Path) -> Iterator[str]:
    """Say who, besides root and this user, may replace a file: a clause for each place.

    Owners and modes are looked at, of the file, its directories, and those that links on
    its way lead through; access control lists are not. On Windows nothing is. Blocks.
    """
    if sys.platform == "win32":
        return
    for place in dict.fromkeys(_way_to(path)):
        try:
            status = os.lstat(place)
        except OSError:
            continue
        if (who := _who(status)) is not None:
            yield f"{place} {who}"


def _way_to(path: Path) -> Iterator[Path]:
    """A file and all above it; and, if it is a link, of what it leads to."""
    for _ in range(_MOST_LINKS):
        yield from (path, *path.parents)
        real = Path(os.path.realpath(path.parent))
        yield from (real, *real.parents)
        try:
            path = path.parent / os.readlink(path)
        except OSError:
            return


if sys.platform != "win32":
    import grp
    import pwd

    def _who(status: os.stat_result) -> str | None:
        """Who else may write it, or None."""
        if status.st_uid not in (0, os.geteuid()):
            return f"belongs to {_user(status.st_uid)}"
        if stat.S_ISLNK(status.st_mode) or _is_sticky(status):
            return None  # there, only its owner replaces a file
        if status.st_mode & stat.S_IWOTH:
            return "can be written by everybody"
        if status.st_mode & stat.S_IWGRP and _has_others(status.st_gid):
            return f"can be written by the group {_group(status.st_gid)}"
        return None

    def _is_sticky(status: os.stat_result) -> bool:
        return stat.S_ISDIR(status.st_mode) and bool(status.st_mode & stat.S_ISVTX)

    def _user(uid: int) -> str:
        try:
            return f"the user {pwd.getpwuid(uid).pw_name}"
        except KeyError:
            return f"the unknown user {uid}"

    def _group(gid: int) -> str:
        try:
            return grp.getgrgid(gid).gr_name
        except KeyError:
            return str(gid)

    def _has_others(gid: int) -> bool:
        """Whether anybody is in a group besides root and this user, as far as is known."""
        try:
            members = set(grp.getgrgid(gid).gr_mem)
        except KeyError:
            return True
        accounts = pwd.getpwall()
        members |= {each.pw_name for each in accounts if each.pw_gid == gid}
        trusted = {
            each.pw_name for each in accounts if each.pw_uid in (0, os.geteuid())
        }
        return not members <= trusted

else:

    def _who(status: os.stat_result) -> str | None:
        return None
