"""An answer that is an error, as the exception for it. A leaf."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from . import wire
from .errors import (
    AccessDeniedError,
    ApiError,
    ConflictError,
    InvalidRequestError,
    NotFoundError,
    ServerFaultError,
)
from .transport import Response

__all__ = ["refusal"]


def refusal(
    response: Response, method: str, path: str, about: Mapping[str, str]
) -> ApiError:
    """The exception for an answer that is an error."""
    fault = wire.fault_of(response.body)
    status = response.status
    reason = _cut(fault.message) or _REASONS.get(status, "no reason given")
    return _class_for(status)(
        f"the server answered {status} to {method} {path.partition('?')[0]}: {reason}",
        status=status,
        code=fault.status or None,
        reason=fault.message,
        **about,
    )


_REASONS: Final = {
    401: "credentials are missing or wrong",
    403: "these credentials are not enough",
    404: "there is nothing of this id",
    407: "a proxy wants credentials",
}


def _cut(text: str) -> str:
    """A proxy may answer with a whole page."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


_LONGEST: Final = 1000


def _class_for(status: int) -> type[ApiError]:
    if status in (401, 403, 407):
        return AccessDeniedError
    if status in (404, 410):
        return NotFoundError
    if status in (409, 412):
        return ConflictError
    if status == 429 or status >= 500:
        return ServerFaultError
    if 400 <= status < 500:
        return InvalidRequestError
    return ApiError
