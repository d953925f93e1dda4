"""Dense models turned into mixtures of experts that compute the same, where mathematics allows."""

from dataclasses import asdict, dataclass
from os import PathLike
from typing import Literal

import torch
from transformers import PreTrainedModel

from moescope.errors import ModelError, OptionError
from moescope.models.checkpoint import CONFIG, locate
from moescope.models.load import load
from moescope.models.quantised import is_quantised
from moescope.models.view import MoEModel
from moescope.runs import read_json
from moescope.surgery.conversion_result import Conversion
from moescope.surgery.conversion_targets import Target, target_of
from moescope.surgery.conversion_weights import Deal
from moescope.surgery.conversion_work import convert


@dataclass(frozen=True, kw_only=True)
class UpcycleOptions:
    """Experts that are copies of the dense feed-forward layer (arXiv 2212.05055)."""

    experts: int = 8
    """Experts per layer."""
    top_k: int = 2
    """Experts per token."""
    noise: float = 0.0
    """Random change of every expert, in standard deviations of each matrix; above 0 the output
    is not kept."""
    seed: int = 0
    """Seed of router and noise."""


@dataclass(frozen=True, kw_only=True)
class SplitOptions:
    """Experts that share out the neurons of the dense feed-forward layer (arXiv 2406.16554)."""

    experts: int = 8
    """Experts per layer; they must divide the number of neurons."""
    top_k: int | None = None
    """Experts per token; all if left out. With fewer, the output is not kept."""
    assignment: Literal["contiguous", "random"] = "contiguous"
    """Whether an expert's neurons are neighbours, or drawn at random."""
    seed: int = 0
    """Seed of the assignment and of the router."""


def upcycle(
    model: str | PathLike[str] | PreTrainedModel,
    options: UpcycleOptions = UpcycleOptions(),
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
) -> Conversion:
    """Copy the feed-forward layers of a dense model into experts, behind a small random router.

    Weights of chosen experts sum to 1, so that the output is kept whatever the router chooses.

    Args:
        model: Dense Llama, Mistral, Qwen2 or Qwen3, as `moescope.load` takes it; its weights stay.
        options: How many experts.
        revision: Branch, tag, or commit, for a Hub id.
        dtype: "auto" (as saved), or the dtype to convert in.

    Raises:
        ModelError: The model cannot be read, has experts already, or cannot have any.
        OptionError: Options that do not fit.
    """
    _require_counts(options.experts, options.top_k)
    if options.noise < 0:
        raise OptionError("noise is negative", got=options.noise, expected="0 or more")
    dense, target = _open(model, revision, dtype)
    config = dense.model.config
    deal = Deal(
        neurons=torch.arange(config.intermediate_size).expand(options.experts, -1),
        router_std=config.initializer_range,
        noise=options.noise,
        seed=options.seed,
    )
    provenance = {"method": "upcycle", "dense": dense.name} | asdict(options)
    return convert(dense, target, deal, options.top_k, provenance, kept=options.noise == 0)


def split(
    model: str | PathLike[str] | PreTrainedModel,
    options: SplitOptions = SplitOptions(),
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
) -> Conversion:
    """Deal out the neurons of a dense model to experts.

    Outputs of experts are scaled by their number E. With all of them chosen and a router of
    zeros, each weighs 1/E and the sum is the dense output. With fewer, k, the router is small and
    random, and the k chosen stand for all at E/k of their output.

    Args:
        model: Dense Llama, Mistral, Qwen2 or Qwen3, as `moescope.load` takes it; its weights stay.
        options: How many experts, and of which neurons.
        revision: Branch, tag, or commit, for a Hub id.
        dtype: "auto" (as saved), or the dtype to convert in.

    Raises:
        ModelError: The model cannot be read, has experts already, or cannot have any.
        OptionError: Options that do not fit.
    """
    top_k = options.experts if options.top_k is None else options.top_k
    _require_counts(options.experts, top_k)
    dense, target = _open(model, revision, dtype)
    config = dense.model.config
    if config.intermediate_size % options.experts:
        raise OptionError(
            f"the feed-forward layers have {config.intermediate_size} neurons, which are not to be "
            f"dealt out to {options.experts} experts evenly",
            expected="a number of experts that divides them",
        )
    order = torch.arange(config.intermediate_size)
    if options.assignment == "random":
        generator = torch.Generator().manual_seed(options.seed)
        order = torch.randperm(config.intermediate_size, generator=generator)
    kept = top_k == options.experts
    deal = Deal(
        neurons=order.view(options.experts, -1),
        scale=options.experts,
        router_std=0.0 if kept else config.initializer_range,
        seed=options.seed,
    )
    provenance = {"method": "split", "dense": dense.name} | asdict(options) | {"top_k": top_k}
    return convert(dense, target, deal, top_k, provenance, kept=kept)


def _require_counts(experts: int, top_k: int) -> None:
    if experts < 2:
        raise OptionError("too few experts", got=experts, expected="2 or more")
    if not 1 <= top_k <= experts:
        raise OptionError(
            f"not a number of experts per token out of {experts}",
            got=top_k,
            expected=f"1 to {experts}",
        )


def _open(
    model: str | PathLike[str] | PreTrainedModel, revision: str | None, dtype: str | torch.dtype
) -> tuple[MoEModel, Target]:
    """The dense model, read only if its configuration is one that can be converted."""
    if isinstance(model, PreTrainedModel):
        target = target_of(model.config.to_dict(), type(model).__name__)
    else:
        checkpoint = locate(model, revision=revision)
        target = target_of(read_json(checkpoint.folder / CONFIG), checkpoint.name)
    dense = load(model, revision=revision, dtype=dtype, dense_as_experts=True)
    if type(dense.model) is not target.dense:
        raise ModelError(
            f"{dense.name} cannot be given experts",
            got=type(dense.model).__name__,
            expected=target.dense.__name__,
        )
    if any(is_quantised(parameter) for parameter in dense.model.parameters()):
        raise ModelError(
            f"the weights of {dense.name} are quantised", remedy="Convert the original weights"
        )
    return dense, target
