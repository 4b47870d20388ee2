"""Patience with stores: what passes (throttling, timeouts, cut connections) is tried again, what does not is told at once."""

from __future__ import annotations

import logging
import random
import re
import time
from collections.abc import Callable
from typing import TypeVar

from paligemma_vla.errors import StorageError, UnreachableError, VLAError, first_line

Result = TypeVar("Result")

# A store that restarts is back within minutes; what takes longer needs a human, and a run can be resumed.
ATTEMPTS = 10
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds; each pause is twice the one before
PATIENCE = 300.0  # seconds; no attempt begins later than that
REMEDY = "check the address, the network and the credentials (for s3:// the usual AWS_ variables)"

# Python's own, for places that are not there and for what is asked wrongly.
FINAL_KINDS = (
    *(FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError),
    *(ValueError, TypeError, LookupError, AttributeError, ImportError, NotImplementedError, RecursionError),
)
# The words of the AWS and Google clients in pyarrow, and of huggingface_hub, for what will not pass either.
FINAL_WORDS = re.compile(
    r"ACCESS_DENIED|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|INVALID_CLIENT_TOKEN_ID|MISSING_AUTHENTICATION_TOKEN|"
    r"UNRECOGNIZED_CLIENT|EXPIRED|TOO_SKEWED|NO_SUCH_|RESOURCE_NOT_FOUND|PERMISSION_DENIED|UNAUTHENTICATED|NOT_FOUND|"
    r"Bucket '[^']*' not found|offline mode is enabled"
)
# As pyarrow ("HTTP status 503"), httpx ("Server error '503 ..."), requests and aiohttp ("503 ...") say it.
STATUS = re.compile(r"(?:HTTP status |status=|(?:Client|Server) error '|^)([345]\d\d)\b", re.IGNORECASE)
PASSING_STATUS = {408, 425, 429, 500, 502, 503, 504, 507, 509, 529}

logger = logging.getLogger(__name__)
_jitter = random.Random()  # of its own: training's random numbers must not depend on the weather


def reach(place: str, action: Callable[[], Result], part: str = "") -> Result:
    """Do something with a place behind a URL; while its store fails in a way that passes, do it again after a pause.

    Pauses grow from FIRST_PAUSE to LONGEST_PAUSE seconds, less up to half at random, so that the processes of a run do not
    come back together. Each is logged. part: which bytes, for messages. Raises `UnreachableError` after ATTEMPTS attempts or
    PATIENCE seconds, `StorageError` for what does not pass.
    """
    began, where = time.monotonic(), f"{place}: {part}" if part else place
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except VLAError:
            raise  # which has been told already
        except Exception as error:  # of any kind: each file system has errors of its own
            reason = first_line(error)
            if not passes(error):
                raise StorageError(f"{where}: cannot be reached ({reason}); {REMEDY}") from error
            pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (attempt - 1)) * _jitter.uniform(0.5, 1.0)
            passed = time.monotonic() - began
            if attempt == ATTEMPTS or passed + pause > PATIENCE:
                tried = f"{attempt} attempts in {passed:.0f} s, the last: {reason}"
                raise UnreachableError(f"{where}: cannot be reached ({tried}); {REMEDY}") from error
            logger.warning("%s: %s; again in %.1f s (attempt %d of %d)", where, reason, pause, attempt + 1, ATTEMPTS)
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def passes(error: Exception) -> bool:
    """Whether an error of a store may be gone at the next attempt; one that is not known may."""
    if isinstance(error, FINAL_KINDS):
        return False
    text = str(error)
    if status := STATUS.search(text):
        return int(status[1]) in PASSING_STATUS
    return not FINAL_WORDS.search(text)
