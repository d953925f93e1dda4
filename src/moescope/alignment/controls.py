"""What the error of a fit is compared with, on the same tokens."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from moescope.alignment.options import RANDOM_SEEDS
from moescope.alignment.randomness import generator, random_rotation
from moescope.alignment.samples import Samples
from moescope.experts.adapter import Adapter
from moescope.experts.weights import ExpertWeights

_PENALTIES = [10 ** (exponent / 2) for exponent in range(-12, 5)]


def hidden_rotation(
    source: ExpertWeights, rotation: Float[Tensor, "hidden hidden"]
) -> ExpertWeights:
    """The expert `z -> source(rotation.T z)`, which an adapter can reach by learning `rotation`."""

    def turned(matrix: Tensor) -> Tensor:
        return (matrix.float() @ rotation.to(matrix.device).T).to(matrix.dtype)

    gate = None if source.gate is None else turned(source.gate)
    return replace(source, gate=gate, up=turned(source.up))


def rotation_for(
    hidden: int, seed: int, source_name: str, rank: int | None = None
) -> Float[Tensor, "hidden hidden"]:
    """The hidden rotation of one source expert.

    Args:
        hidden: Width.
        seed: Of all random choices.
        source_name: Keys the choice.
        rank: Rank of its difference from the identity, at most `hidden`: `I + Q (O - I) Q.T` with
            orthonormal columns Q and a random rotation O of so many dimensions. None: a uniform
            rotation of all dimensions.
    """
    if rank is None:
        return random_rotation(hidden, generator(seed, source_name, "rotation"))
    source = generator(seed, source_name, "rotation", rank)
    columns = torch.randn(hidden, rank, dtype=torch.float64, generator=source)
    q, _ = torch.linalg.qr(columns)
    turn = random_rotation(rank, source).double()
    # With the other determinant one direction in the span of Q would stay as it is.
    if rank and torch.linalg.det(turn) * (-1) ** rank < 0:
        turn[0] *= -1
    eye = torch.eye(hidden, dtype=torch.float64)
    rotation: Tensor = eye + q @ (turn - torch.eye(rank, dtype=torch.float64)) @ q.T
    return rotation.float()


def same_output_space(target: ExpertWeights, seed: int, name: str) -> list[ExpertWeights]:
    """Random targets of the first kind: gate and up random, down projection the target's own.

    Every random row has the norm of the row it replaces.
    """
    found = []
    for j in range(RANDOM_SEEDS):
        source = generator(seed, name, "random gate and up", j)
        gate = None if target.gate is None else _like(target.gate, _row_norms(target.gate), source)
        up = _like(target.up, _row_norms(target.up), source)
        found.append(_with(target, gate, up, target.down))
    return found


def all_random(targets: Sequence[ExpertWeights], seed: int) -> list[ExpertWeights]:
    """Random targets of the second kind: all three matrices, shared by targets of one shape.

    Each random neuron takes the norms of its gate row, up row and down column from one neuron
    drawn from all targets; biases and activation are the first's.
    """
    first = targets[0]
    up_norms = torch.cat([_row_norms(t.up) for t in targets])
    down_norms = torch.cat([_row_norms(t.down.T) for t in targets])
    gates = [_row_norms(t.gate) for t in targets if t.gate is not None]
    found = []
    for j in range(RANDOM_SEEDS):
        source = generator(seed, "all random", j)
        size = (first.intermediate_size,)
        chosen = torch.randint(len(up_norms), size, generator=source).to(up_norms.device)
        gate = None
        if first.gate is not None:
            gate = _like(first.gate, torch.cat(gates)[chosen], source)
        up = _like(first.up, up_norms[chosen], source)
        down = _like(first.down.T, down_norms[chosen], source).T.contiguous()
        found.append(_with(first, gate, up, down))
    return found


def _row_norms(matrix: Tensor) -> Tensor:
    norms: Tensor = matrix.float().norm(dim=1)
    return norms


def _like(matrix: Tensor, norms: Tensor, source: torch.Generator) -> Tensor:
    """Gaussian directions with these row norms, in the shape and dtype of `matrix`."""
    normal = torch.randn(matrix.shape, generator=source).to(matrix.device)
    like: Tensor = (normal * (norms / normal.norm(dim=1))[:, None]).to(matrix.dtype)
    return like


def _with(expert: ExpertWeights, gate: Tensor | None, up: Tensor, down: Tensor) -> ExpertWeights:
    return replace(expert, gate=gate, up=up, down=down)


def linear_map(train: Samples, inner: Samples) -> Adapter:
    """The best linear map from inputs to outputs, without any expert, of form "linear".

    Ridge, in fp64. The penalty is the best on the inner tokens among 17 from 1e-6 to 1e2 times the
    mean variance of the inputs; the map is then fitted again on training and inner tokens together.
    """
    ridge = _Ridge(train)
    penalty = min(_PENALTIES, key=lambda p: _squared_error(ridge(inner.inputs, p), inner.outputs))
    joined = Samples(
        torch.cat([train.inputs, inner.inputs]), torch.cat([train.outputs, inner.outputs])
    )
    weight, shift = _Ridge(joined).map(penalty)
    return Adapter(weight=weight.T.float(), shift=shift.float(), form="linear")


class _Ridge:
    """All ridge regressions of one sample: the covariance is decomposed once."""

    def __init__(self, samples: Samples) -> None:
        x, y = samples.inputs.double(), samples.outputs.double()
        self.x_mean, self.y_mean = x.mean(0), y.mean(0)
        x = x - self.x_mean
        values, self.vectors = torch.linalg.eigh(x.T @ x / len(x))
        self.values = values.clamp_min(0)[:, None]
        self.products = self.vectors.T @ x.T @ (y - self.y_mean) / len(x)

    def map(self, penalty: float) -> tuple[Tensor, Tensor]:
        """Weight [hidden in, hidden out] and shift [hidden]."""
        level = penalty * self.values.mean().clamp_min(1e-30)
        weight = self.vectors @ (self.products / (self.values + level))
        return weight, self.y_mean - self.x_mean @ weight

    def __call__(self, x: Tensor, penalty: float) -> Tensor:
        weight, shift = self.map(penalty)
        predicted: Tensor = (shift + x.double() @ weight).float()
        return predicted


def _squared_error(predicted: Tensor, y: Tensor) -> float:
    return float((predicted - y).square().sum())


def project_on_outputs(
    y: Float[Tensor, "tokens hidden"], target: ExpertWeights
) -> Float[Tensor, "tokens hidden"]:
    """The nearest point to each row that the target can emit for any intermediate activation.

    That is the column space of the down projection, moved by its bias.
    """
    down = target.down.to(y.device).double()
    bias = torch.zeros(len(down), device=y.device, dtype=torch.float64)
    if target.down_bias is not None:
        bias = target.down_bias.to(y.device).double()
    basis, values, _ = torch.linalg.svd(down, full_matrices=False)
    basis = basis[:, values > 1e-6 * values.max().clamp_min(1e-30)]
    nearest: Tensor = (bias + (y.double() - bias) @ basis @ basis.T).float()
    return nearest
