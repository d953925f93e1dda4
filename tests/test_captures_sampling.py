import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.captures import sampling
from moescope.captures.sampling import Reservoirs, expert_keys, lowest, priorities, splitmix64

CPU = torch.device("cpu")


def test_splitmix64_gives_the_published_sequence():
    # The first outputs of the reference generator with seed 1234567.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    states = 1234567 + torch.arange(3) * sampling._GOLDEN
    assert [value % 2**64 for value in splitmix64(states).tolist()] == expected


def test_keys_differ_between_seeds_layers_and_experts():
    keys = torch.cat([expert_keys(seed, layer, 16) for seed in range(9) for layer in range(9)])
    assert len(keys.unique()) == 9 * 9 * 16


def test_priorities_are_uniform():
    experts = torch.zeros(100_000, 1, dtype=torch.int64)
    numbers = priorities(expert_keys(0, 0, 1), experts, torch.arange(100_000)) / 2.0**63
    assert numbers.min() >= 0
    # Kolmogorov-Smirnov against the uniform distribution, 0.1% level.
    distance = (numbers[:, 0].sort().values - torch.linspace(0, 1, 100_000)).abs().max()
    assert distance < 1.95 / 100_000**0.5


def brute_force(experts, per_expert, keys):
    """The sample by sorting all tokens of each expert."""
    numbers = priorities(keys, experts, torch.arange(len(experts)))
    chosen = set()
    for expert in range(len(keys)):
        routed = [
            (int(numbers[token, slot]), token)
            for token, slot in (experts == expert).nonzero().tolist()
        ]
        chosen |= {token for _, token in sorted(routed)[:per_expert]}
    return sorted(chosen)


def online(experts, per_expert, keys, batch):
    reservoirs = Reservoirs(keys, per_expert, CPU)
    for first in range(0, len(experts), batch):
        part = experts[first : first + batch]
        accepted = reservoirs.candidates(part, first).nonzero()[:, 0]
        reservoirs.offer(first + accepted, part[accepted].to(torch.int16))
    return reservoirs.sample().tolist()


def random_experts(tokens, num_experts, top_k, seed):
    """Routing with very unequal experts."""
    generator = torch.Generator().manual_seed(seed)
    noise = -torch.rand(tokens, num_experts, generator=generator).log().log()
    return (noise - torch.arange(num_experts) / 2).topk(top_k).indices


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 400),
    per_expert=st.integers(0, 60),
    batch=st.integers(1, 100),
    seed=st.integers(0, 2**62),
)
def test_the_sample_is_the_bottom_k_of_every_expert_in_any_batches(tokens, per_expert, batch, seed):
    slack, sampling._SLACK = sampling._SLACK, 4  # lower thresholds all the time
    try:
        experts = random_experts(tokens, 6, 2, seed)
        keys = expert_keys(seed, 3, 6)
        assert online(experts, per_expert, keys, batch) == brute_force(experts, per_expert, keys)
    finally:
        sampling._SLACK = slack


def test_few_tokens_pass_once_the_thresholds_have_settled():
    experts = random_experts(200_000, 8, 2, seed=0)
    reservoirs, passed = Reservoirs(expert_keys(0, 0, 8), 500, CPU), 0
    for first in range(0, 200_000, 1_000):
        part = experts[first : first + 1_000]
        accepted = reservoirs.candidates(part, first).nonzero()[:, 0]
        reservoirs.offer(first + accepted, part[accepted].to(torch.int16))
        passed += len(accepted)
    # k (1 + ln(n/k)) per expert with exact thresholds: 4,000 (1 + ln 100) = 22,400 pairs.
    assert passed < 40_000
    assert len(reservoirs._numbers) < 1.25 * 8 * 500 + sampling._SLACK


def test_a_sample_is_uniform_over_the_routed_tokens():
    experts = torch.zeros(1_000, 1, dtype=torch.int64)
    counts = torch.zeros(1_000)
    for seed in range(2_000):
        counts[online(experts, 100, expert_keys(seed, 0, 1), 1_000)] += 1
    # Each token is chosen 200 times of 2,000 in the mean; chi-square with 999 degrees of freedom.
    statistic = ((counts - 200) ** 2 / (2_000 * 0.1 * 0.9)).sum()
    assert 860 < statistic < 1_145  # 99.8%


def test_equal_numbers_are_decided_by_token_order():
    experts, numbers = torch.tensor([0, 0, 1, 0]), torch.tensor([5, 5, 9, 1])
    assert lowest(experts, numbers, torch.tensor([2, 3])).tolist() == [3, 0, 2]
