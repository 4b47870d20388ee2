"""What can go wrong between a robot and a policy server."""

from __future__ import annotations


class PolicyError(Exception):
    """Base of all that the clients raise, beside `CodecError` for an observation that cannot be encoded."""


class PolicyServerError(PolicyError):
    """The server refused a request, or answered what no policy server answers. The text is the server's."""


class PolicyTimeout(PolicyError, TimeoutError):
    """No answer came in time. If one comes later, it is never taken for another's."""


class PolicyConnectionError(PolicyError, ConnectionError):
    """The server was not reached, or the connection was lost twice in one request."""


class ContractError(PolicyError, ValueError):
    """The policy is not the one that the robot's program was written for."""
