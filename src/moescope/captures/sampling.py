"""Which tokens enter the sample: random, yet the same however the work was cut up.

Every (layer, expert, token) has a fixed random number. An expert's sample is the tokens with its
lowest numbers ("bottom-k"): a uniform sample without replacement, whatever the batches and
interruptions were. While tokens stream by, each expert has a threshold that never lies below its
final k-th lowest number; tokens above it can be forgotten at once.
"""

import torch
from jaxtyping import Bool, Int, Int64
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)
_NEVER = torch.iinfo(torch.int64).max
_SLACK = 1 << 12


def splitmix64(state: Int64[Tensor, "*shape"]) -> Int64[Tensor, "*shape"]:
    """One output of the SplitMix64 generator for each state, as bits of an int64.

    Source: Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014.
    """
    z = state + _GOLDEN
    z = (z ^ _shifted(z, 30)) * _MIX_1
    z = (z ^ _shifted(z, 27)) * _MIX_2
    return z ^ _shifted(z, 31)


def _shifted(z: Int64[Tensor, "*shape"], bits: int) -> Int64[Tensor, "*shape"]:
    """Shift right, filling with zeros; `>>` would copy the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def expert_keys(seed: int, layer: int, num_experts: int) -> Int64[Tensor, "experts"]:
    """A key per expert of a layer, which `Place.number` tells from all others."""
    key = splitmix64(torch.tensor(seed, dtype=torch.int64))
    key = splitmix64(key + layer)
    return splitmix64(key + torch.arange(num_experts))


def priorities(
    keys: Int64[Tensor, "experts"],
    experts: Int[Tensor, "tokens top_k"],
    tokens: Int64[Tensor, "tokens"],
) -> Int64[Tensor, "tokens top_k"]:
    """The random number in [0, 2^63) of each token for each of its experts; low ones are kept.

    A slot that no expert was used for (-1) has the highest number there is, which is never kept.
    """
    numbers = _shifted(splitmix64(keys[experts.long()] + tokens[:, None] * _GOLDEN), 1)
    return numbers.masked_fill_(experts < 0, _NEVER)


def lowest(
    experts: Int64[Tensor, "pairs"],
    numbers: Int64[Tensor, "pairs"],
    wanted: Int64[Tensor, "experts"],
) -> Int64[Tensor, "kept"]:
    """Find, for each expert e, its `wanted[e]` pairs with the lowest numbers.

    Pairs must be in token order: of equal numbers the earlier one is lower.

    Returns:
        Their indices, sorted by expert, then number.
    """
    order = numbers.argsort(stable=True)
    order = order[experts[order].argsort(stable=True)]
    count = experts.bincount(minlength=len(wanted))
    start = count.cumsum(0) - count
    rank = torch.arange(len(order)) - start[experts[order]]
    return order[rank < wanted[experts[order]]]


class Reservoirs:
    """The reservoirs of all experts of one layer.

    Holds 18 bytes for each of at most 1.25 `per_expert` tokens per expert (plus one batch), not
    the tokens' tensors.
    """

    def __init__(
        self, keys: Int64[Tensor, "experts"], per_expert: int, device: torch.device
    ) -> None:
        self.device = device
        self._keys = keys
        self._device_keys = keys.to(device)
        self._wanted = torch.full((len(keys),), per_expert)
        self._limits = torch.full((len(keys),), _NEVER if per_expert else 0, device=device)
        self._experts = torch.empty(0, dtype=torch.int16)
        self._numbers = torch.empty(0, dtype=torch.int64)
        self._tokens = torch.empty(0, dtype=torch.int64)

    def candidates(
        self, experts: Int64[Tensor, "tokens top_k"], first_token: int
    ) -> Bool[Tensor, "tokens"]:
        """Tell which of consecutive tokens may still belong to some expert's sample.

        Runs on the device of the model.
        """
        tokens = torch.arange(first_token, first_token + len(experts), device=experts.device)
        numbers = priorities(self._device_keys, experts, tokens)
        return (numbers < self._limits[experts]).any(1)

    def offer(self, tokens: Int64[Tensor, "tokens"], experts: Int[Tensor, "tokens top_k"]) -> None:
        """Take note of candidates, in token order, and lower the thresholds now and then."""
        numbers = priorities(self._keys, experts, tokens)
        lower = numbers < self._limits.cpu()[experts.long()]
        self._experts = torch.cat([self._experts, experts[lower].to(torch.int16)])
        self._numbers = torch.cat([self._numbers, numbers[lower]])
        self._tokens = torch.cat([self._tokens, tokens[:, None].expand_as(experts)[lower]])
        if len(self._numbers) > 1.25 * int(self._wanted.sum()) + _SLACK:
            self._shrink()

    def sample(self) -> Int64[Tensor, "sample"]:
        """The tokens that are in some expert's sample, sorted."""
        self._shrink()
        tokens: Tensor = torch.unique(self._tokens)
        return tokens

    def _shrink(self) -> None:
        kept = lowest(self._experts.long(), self._numbers, self._wanted)
        count = self._experts[kept].long().bincount(minlength=len(self._wanted))
        full = (count == self._wanted) & (self._wanted > 0)
        limits = self._limits.cpu().clone()
        # Within `kept` an expert's last pair has its highest number.
        limits[full] = self._numbers[kept[(count.cumsum(0) - 1)[full]]]
        self._limits = limits.to(self.device)
        kept = kept.sort().values
        self._experts, self._numbers = self._experts[kept], self._numbers[kept]
        self._tokens = self._tokens[kept]
