from itertools import permutations

import numpy as np
import pytest

from moescope.measures.expert_runs import Passages, geometric_run, mean_run, stays, used_by


def random_experts(tokens, experts, top_k, seed):
    random = np.random.default_rng(seed)
    return random.random((tokens, experts)).argsort(1)[:, :top_k]


def test_passages_end_where_a_label_changes():
    passages = Passages.of(np.array([0, 0, 1, 1, 1]), np.array([4, 4, 4, 4, 5]))
    assert passages.starts.tolist() == [0, 2, 4]
    assert passages.lengths.tolist() == [2, 2, 1]
    assert passages.of_token.tolist() == [0, 0, 1, 1, 2]


def test_a_shift_turns_each_passage_in_a_circle():
    passages = Passages.of(np.repeat([0, 1, 2], [5, 1, 4]))
    random = np.random.default_rng(0)
    turns = set()
    for _ in range(50):
        moved = passages.shifted(random)
        assert sorted(moved[:5].tolist()) == list(range(5))
        assert ((moved[1:5] - moved[:4]) % 5 == 1).all()
        assert moved[5] == 5
        assert sorted(moved[6:].tolist()) == [6, 7, 8, 9]
        turns.add((int(moved[0]), int(moved[6])))
    assert len(turns) > 10


def test_unused_slots_use_no_expert():
    used = used_by(np.array([[0, -1], [2, 1], [-1, -1]]), 3)
    assert used.tolist() == [[True, False, False], [False, True, True], [False, False, False]]


def test_runs_by_hand():
    """Expert 0 at tokens 0, 1, 3 of the first passage and 0 of the second: three runs."""
    experts = np.array([[0], [0], [1], [0], [0], [2]])
    found = stays(used_by(experts, 3), Passages.of(np.array([0, 0, 0, 0, 1, 1])))
    assert found.tokens.tolist() == [[3, 1, 0], [1, 0, 1]]
    assert found.stayed.tolist() == [[1, 0, 0], [0, 0, 0]]
    runs = mean_run(found.tokens.sum(0), found.stayed.sum(0))
    assert runs.tolist() == [4 / 3, 1, 1]
    assert np.isnan(mean_run(np.array([0]), np.array([0])))[0]


def test_the_shuffled_null_is_the_mean_over_all_orders():
    experts = random_experts(6, 4, 2, 0)
    found = stays(used_by(experts, 4), Passages.of(np.array([0, 0, 0, 0, 1, 1])))
    orders = [[*order, 4, 5] for order in permutations(range(4))]
    stayed = [
        stays(used_by(experts[order], 4), Passages.of(np.array([0, 0, 0, 0, 1, 1]))).stayed[0]
        for order in orders
    ]
    assert found.shuffled[0] == pytest.approx(np.mean(stayed, 0))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_independent_tokens_have_runs_of_the_formula(share):
    used = np.random.default_rng(1).random((200_000, 1)) < share
    found = stays(used, Passages.of(np.zeros(len(used), dtype=int)))
    runs = found.tokens.sum() - found.stayed.sum()
    length = mean_run(found.tokens, found.stayed)[0, 0]
    expected = geometric_run(np.array([share]))[0]
    # Standard deviation of a geometric run over the root of how many there are; four of them.
    assert length == pytest.approx(expected, abs=4 * np.sqrt(share) / (1 - share) / np.sqrt(runs))


@pytest.mark.parametrize("block", [1, 3, 10])
def test_planted_blocks_are_recovered(block):
    """A new expert, another one than before, every `block` tokens."""
    experts = (np.arange(300) // block % 5)[:, None]
    found = stays(used_by(experts, 5), Passages.of(np.zeros(300, dtype=int)))
    assert mean_run(found.tokens.sum(0), found.stayed.sum(0)).tolist() == [block] * 5


def test_an_expert_of_all_tokens_has_one_endless_run():
    assert geometric_run(np.array([1.0, 0.0])).tolist() == [np.inf, 1]
