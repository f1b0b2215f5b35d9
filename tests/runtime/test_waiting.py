"""The queue: in turn, in the order of the policy, and easy to leave."""

from quantlab.runtime.request import Request, SamplingParams, Sequence
from quantlab.runtime.waiting import SLACK, WaitingQueue


def sequence(order: int, priority: int = 0, length: int = 3) -> Sequence:
    return Sequence(Request(str(order), tuple(range(length)), SamplingParams(), priority), order=order)


def drain(queue: WaitingQueue) -> list[int]:
    orders = []
    while queue.peek() is not None:
        orders.append(queue.pop().order)
    return orders


def test_first_come_first_served_whatever_the_priority() -> None:
    queue = WaitingQueue("fcfs")
    for order in (2, 1, 3):
        queue.push(sequence(order, priority=-order))
    assert drain(queue) == [1, 2, 3]


def test_lower_priorities_come_first_and_equal_ones_in_turn() -> None:
    queue = WaitingQueue("priority")
    for order, priority in ((1, 5), (2, 0), (3, 5), (4, -1)):
        queue.push(sequence(order, priority))
    assert drain(queue) == [4, 2, 1, 3]


def test_who_comes_back_finds_its_old_place() -> None:
    queue = WaitingQueue("fcfs")
    queue.push(sequence(1))
    back = queue.pop()
    queue.push(sequence(2))
    queue.push(back)
    assert drain(queue) == [1, 2]


def test_who_leaves_is_not_served_and_its_tokens_do_not_count() -> None:
    queue = WaitingQueue("fcfs")
    members = [sequence(order, length=order) for order in (1, 2, 3)]
    for member in members:
        queue.push(member)
    assert queue.remove(members[0])
    assert not queue.remove(members[0])
    assert (len(queue), queue.tokens, members[0] in queue) == (2, 5, False)
    assert drain(queue) == [2, 3]
    assert queue.tokens == 0


def test_a_token_learned_while_waiting_counts() -> None:
    queue = WaitingQueue("fcfs")
    member = sequence(1)
    queue.push(member)
    queue.learn(member, 7)
    assert (member.output_ids, queue.tokens) == ([7], 4)
    queue.pop()
    assert queue.tokens == 0


def test_what_has_left_does_not_pile_up() -> None:
    queue = WaitingQueue("fcfs")
    first = sequence(0)
    queue.push(first)
    for order in range(1, 1000):
        member = sequence(order)
        queue.push(member)
        queue.remove(member)
    assert len(queue._heap) <= 2 * len(queue) + SLACK + 1
    assert drain(queue) == [0]
