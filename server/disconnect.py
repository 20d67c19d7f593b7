"""Work that nobody waits for any more is ended: the client may go away at any time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from server.errors import ClientDisconnected

Result = TypeVar("Result")


async def unless_disconnected(
    receive: Receive, work: Coroutine[Any, Any, Result], *, release: Callable[[Result], None] | None = None
) -> Result:
    """The result of `work`, which is cancelled when the client goes away first. Raises ClientDisconnected then.

    The body must have been read already: from here on the server has nothing more to deliver than the disconnect. The work gets
    a task of its own: there it wakes up without going through the calls of every layer above us, some thirty, each time.

    release: lets go of a result that nobody gets, since the caller was cancelled in the moment in which it was there.
    """
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_disconnected(receive))
    try:
        try:
            await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ClientDisconnected
            return task.result()
        finally:
            for pending in (task, watcher):
                pending.cancel()
            await asyncio.gather(task, watcher, return_exceptions=True)
    except BaseException:
        if release is not None and task.done() and not task.cancelled() and task.exception() is None:
            release(task.result())
        raise


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
