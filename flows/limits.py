"""Prefect's concurrency limit `gpu`: how many small runs go on at once on one machine, over all flows on one server.

`unmask up` creates it. A job takes its share of the machine before it begins, in any flow on a server; a run without a
server, or whose server has died, takes nothing, as nothing could be counted. What a job holds is a lease, renewed while
it runs: a process that was killed holds its share for LEASE_SECONDS at most, and until the next stage begins on its
machine (`flows.janitor`).
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

from flows import janitor, workspace

NAME = "gpu"
LEASE_SECONDS = 60.0
"""The least that Prefect's server takes."""
RENEW_SECONDS, RETRY_SECONDS = 15.0, 0.5


@contextmanager
def held(share: int, stopping: Callable[[], bool]) -> Iterator[None]:
    """Hold `share` slots of the limit, waiting for them until `stopping`; of a smaller limit the whole.

    Raises UserError where the server has no such limit: two runs would share one device in silence.
    """
    from httpx import TransportError
    from prefect import get_client
    from prefect.settings import get_current_settings

    if not get_current_settings().api.url:
        yield
        return
    lease = None
    try:
        with get_client(sync_client=True) as client:
            lease = _acquire(client, share, stopping)
    except TransportError as error:
        print(f"Prefect's server does not answer, a job begins without its limit '{NAME}': {error}", file=sys.stderr)
    if not lease:
        yield
        return
    janitor.note_lease(lease, True)
    ended = threading.Event()
    threading.Thread(target=_renew, args=(lease, ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        janitor.note_lease(lease, False)
        # A server that died keeps the lease for as long as one of ours; a client that had no answer yet asks it once.
        with contextlib.suppress(Exception), get_client(sync_client=True) as client:
            client.release_concurrency_slots_with_lease(lease)


def _acquire(client: Any, share: int, stopping: Callable[[], bool]) -> UUID | None:
    from httpx import HTTPStatusError
    from prefect.exceptions import ObjectNotFound

    try:
        limit = client.read_global_concurrency_limit_by_name(NAME).limit
    except ObjectNotFound:
        raise workspace.UserError(
            f"the Prefect server at {client.api_url} has no concurrency limit '{NAME}'; run `unmask up`, or for a "
            f"team's server `prefect gcl create {NAME} --limit N` with as many as small runs may go on at once"
        ) from None
    while not stopping():
        try:
            answer = client.increment_concurrency_slots_with_lease(
                [NAME], min(share, limit), "concurrency", LEASE_SECONDS
            )
            return UUID(answer.json()["lease_id"])
        except HTTPStatusError as error:
            if error.response.status_code != 423:  # all are taken
                raise
            time.sleep(RETRY_SECONDS)
    return None


def _renew(lease: UUID, ended: threading.Event) -> None:
    from prefect import get_client

    while not ended.wait(RENEW_SECONDS):
        # A lease that ran out while the server was away is lost; the job goes on, as it has the device.
        with contextlib.suppress(Exception), get_client(sync_client=True) as client:
            client.renew_concurrency_lease(lease, LEASE_SECONDS)
