"""The choices of each request: `n` of them share one prompt, which the first computes while the others wait to fork from it."""

from __future__ import annotations

from collections.abc import Iterator

from engine.request import Request, RequestStatus


class Siblings:
    """All choices that have not ended, by request id. num_matchers: how many of them have one."""

    def __init__(self) -> None:
        self.by_id: dict[str, list[Request]] = {}
        self.num_matchers = 0

    def add(self, choices: list[Request]) -> list[Request]:
        """Take in the choices of one request. Returns those to queue: the first, from which the others are to fork, or each
        of them where they bring output from an earlier engine (or want none)."""
        self.by_id[choices[0].request_id] = list(choices)
        self.num_matchers += sum(request.matcher is not None for request in choices)
        head, rest = choices[0], choices[1:]
        if any(request.num_output_tokens for request in choices) or head.sampling.max_tokens == 0:
            return choices
        for request in rest:
            request.status = RequestStatus.PENDING_FORK
        head.pending_forks = rest
        return [head]

    def of(self, request_id: str) -> list[Request]:
        """The choices of a request that have not ended; none of an id that is not known."""
        return list(self.by_id.get(request_id, ()))

    def hand_prompt_on(self, request: Request) -> Request | None:
        """The choice goes away before its siblings have forked from it: the next of them computes the prompt instead. Returns
        that one, which is to be queued."""
        for sibling in self.by_id[request.request_id]:
            if request in sibling.pending_forks:
                sibling.pending_forks.remove(request)
        if not request.pending_forks:
            return None
        heir, *rest = request.pending_forks
        heir.pending_forks, request.pending_forks = rest, []
        return heir

    def remove(self, request: Request) -> None:
        """The choice has ended."""
        choices = self.by_id[request.request_id]
        choices.remove(request)
        if not choices:
            del self.by_id[request.request_id]
        self.num_matchers -= request.matcher is not None

    def __iter__(self) -> Iterator[Request]:
        for choices in self.by_id.values():
            yield from choices
