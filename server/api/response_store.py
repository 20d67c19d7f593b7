"""The responses that later requests may build on: in memory, bounded in number and bytes, the least recently used go first."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator

import msgspec

from engine.errors import InvalidRequest
from server.api.responses_types import Item, ResponseObject
from server.errors import NotFound

logger = logging.getLogger("octavo.server")

MAX_STORE_BYTES = 256 * 2**20


class StoredResponse:
    """One turn: what its request brought, and what was answered. Its conversation is that of `previous`, then this.

    num_bytes: of this turn as JSON; chain_bytes: together with all turns before it. owner: whose it is, as are those before it.
    """

    def __init__(
        self, response: ResponseObject, input_items: list[Item], previous: StoredResponse | None, owner: str = ""
    ) -> None:
        self.owner = owner
        self.response = response
        self.input_items = input_items
        self.previous = previous
        self.num_bytes = len(msgspec.json.encode(response)) + len(msgspec.json.encode(input_items))
        self.chain_bytes: int = self.num_bytes + (previous.chain_bytes if previous else 0)
        # By the store, under its id, and by the turns that come after it.
        self.num_holders = 0

    def conversation(self) -> list[Item]:
        """All items up to this turn's answer, oldest first."""
        return [item for turn in self._turns() for item in (*turn.input_items, *turn.response.output)]

    def input_context(self) -> list[Item]:
        """All items that this turn's answer was made from."""
        return [*(self.previous.conversation() if self.previous else ()), *self.input_items]

    def _turns(self) -> Iterator[StoredResponse]:
        turns = [self]
        while (previous := turns[-1].previous) is not None:
            turns.append(previous)
        return reversed(turns)


class ResponseStore:
    """All owners' responses, within one bound. `of` gives one owner's: nobody sees, replaces or deletes what is another's.

    A turn that has lost its id, deleted or pushed out, is kept (and counted) for as long as a later turn needs it."""

    def __init__(self, max_responses: int, max_bytes: int = MAX_STORE_BYTES) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._by_id: OrderedDict[tuple[str, str], StoredResponse] = OrderedDict()
        self._items: dict[tuple[str, str], Item] = {}
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._by_id)

    def __contains__(self, key: tuple[str, str]) -> bool:
        """key: owner and id."""
        return key in self._by_id

    def of(self, owner: str) -> OwnedResponses:
        return OwnedResponses(self, owner)

    def put(self, turn: StoredResponse) -> None:
        """Keeps the turn, and what it builds on, unless that alone is more than the store holds."""
        if self._max_responses == 0:
            return
        if turn.chain_bytes > self._max_bytes:
            logger.warning("%s is not stored: its conversation has %d bytes", turn.response.id, turn.chain_bytes)
            return
        key = (turn.owner, turn.response.id)
        self._hold(turn)
        self._release(self._by_id.pop(key, None))  # ids may come from clients, twice too
        self._by_id[key] = turn
        while len(self._by_id) > self._max_responses or self.num_bytes > self._max_bytes:
            _, oldest = self._by_id.popitem(last=False)
            self._release(oldest)

    def get(self, owner: str, response_id: str) -> StoredResponse:
        """Raises NotFound."""
        turn = self._by_id.get((owner, response_id))
        if turn is None:
            raise NotFound("There is no response of that id here: it was never stored, was deleted, or has been pushed out.")
        self._by_id.move_to_end((owner, response_id))
        return turn

    def item(self, owner: str, item_id: str) -> Item | None:
        return self._items.get((owner, item_id))

    def delete(self, owner: str, response_id: str) -> None:
        """Raises NotFound."""
        self.get(owner, response_id)
        self._release(self._by_id.pop((owner, response_id)))

    def _hold(self, turn: StoredResponse | None) -> None:
        """Counts a turn, and the turns before it that had been let go of in the meantime."""
        while turn is not None:
            turn.num_holders += 1
            if turn.num_holders > 1:
                return
            self.num_bytes += turn.num_bytes
            for item in (*turn.input_items, *turn.response.output):
                self._items[turn.owner, item.id] = item
            turn = turn.previous

    def _release(self, turn: StoredResponse | None) -> None:
        while turn is not None:
            turn.num_holders -= 1
            if turn.num_holders:
                return
            self.num_bytes -= turn.num_bytes
            for item in (*turn.input_items, *turn.response.output):
                if self._items.get((turn.owner, item.id)) is item:
                    del self._items[turn.owner, item.id]
            turn = turn.previous


class OwnedResponses:
    """One owner's part of a store."""

    def __init__(self, store: ResponseStore, owner: str) -> None:
        self._store = store
        self._owner = owner

    def put(self, response: ResponseObject, input_items: list[Item], previous: StoredResponse | None) -> None:
        """Keeps the response, and what it builds on, unless that alone is more than the store holds."""
        self._store.put(StoredResponse(response, input_items, previous, self._owner))

    def get(self, response_id: str) -> StoredResponse:
        """Raises NotFound."""
        return self._store.get(self._owner, response_id)

    def previous(self, response_id: str) -> StoredResponse:
        """The same for `previous_response_id`. Raises InvalidRequest."""
        try:
            return self.get(response_id)
        except NotFound as error:
            raise InvalidRequest(error.message, param="previous_response_id", code="previous_response_not_found") from None

    def item(self, item_id: str) -> Item | None:
        return self._store.item(self._owner, item_id)

    def delete(self, response_id: str) -> None:
        """Raises NotFound."""
        self._store.delete(self._owner, response_id)
