"""The requests that wait for their turn, in the order of a policy.

Knows nothing about blocks, budgets or what runs.
"""

import heapq
from collections.abc import Iterator

from quantlab.runtime.options import Policy
from quantlab.runtime.request import Sequence

SLACK = 64  # entries of requests that have left, kept before the heap is made anew


class WaitingQueue:
    """A heap by (priority, order of arrival), or by order of arrival alone; what is preempted finds its old place.

    Leaving from the middle is O(1): the entry stays and is dropped when it comes up.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._heap: list[tuple[int, int, Sequence]] = []
        self._members: dict[int, Sequence] = {}
        self.tokens = 0

    def __len__(self) -> int:
        return len(self._members)

    def push(self, sequence: Sequence) -> None:
        """Let `sequence` wait; until it leaves, it gets longer through `learn` alone."""
        rank = sequence.request.priority if self._policy == "priority" else 0
        heapq.heappush(self._heap, (rank, sequence.order, sequence))
        self._members[sequence.order] = sequence
        self.tokens += sequence.length

    def peek(self) -> Sequence | None:
        """The sequence whose turn is next."""
        while self._heap and self._heap[0][1] not in self._members:
            heapq.heappop(self._heap)
        return self._heap[0][2] if self._heap else None

    def pop(self) -> Sequence:
        """Take out the sequence whose turn is next; it may come back."""
        sequence = self.peek()
        assert sequence is not None, "nothing waits"
        heapq.heappop(self._heap)
        self._leave(sequence)
        return sequence

    def remove(self, sequence: Sequence) -> bool:
        """Take `sequence` out for good, wherever it is; returns whether it was here."""
        if sequence.order not in self._members:
            return False
        self._leave(sequence)
        if len(self._heap) > 2 * len(self._members) + SLACK:
            self._heap = [entry for entry in self._heap if entry[1] in self._members]
            heapq.heapify(self._heap)
        return True

    def learn(self, sequence: Sequence, token: int) -> None:
        """A token that was sampled for `sequence` before it was sent back here."""
        sequence.output_ids.append(token)
        self.tokens += 1

    def _leave(self, sequence: Sequence) -> None:
        del self._members[sequence.order]
        self.tokens -= sequence.length

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._members.values())

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence.order in self._members
