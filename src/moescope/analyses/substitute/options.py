"""What can be set about `substitute`."""

from dataclasses import dataclass
from typing import Literal

from moescope.alignment.options import RANDOM_SEEDS, FitOptions
from moescope.config import IntList
from moescope.errors import OptionError, require_least

AdapterForm = Literal["low_rank", "layer_norm"]


@dataclass(frozen=True, kw_only=True)
class SubstituteOptions:
    """Options of `substitute`."""

    sources: int = 6
    """Experts to take out, one at a time: drawn at random, as evenly over the source layers as
    can be."""
    source_layers: IntList = ()
    """Layers to draw them from; all if left out."""
    source_experts: IntList = ()
    """Take out these experts of every source layer, and draw none."""
    target_layers: IntList = ()
    """Layers whose experts stand in for them; all if left out. A source's own layer is left to a
    comparison of its own."""
    forms: tuple[AdapterForm, ...] = ("low_rank",)
    """What the adapters may do: `low_rank`, a diagonal and a delta of `rank`; `layer_norm`, any
    matrix; both with a LayerNorm behind."""
    rank: int = 16
    """Rank of the delta; of `low_rank` alone."""
    candidates: int = 8
    """Random experts are compared with experts of other layers as the best of equally many: this
    many, drawn from all (all, if there are no more). Of the layer of the source itself, as many as
    it has."""
    random: int = RANDOM_SEEDS
    """Draws of random experts to compare with; with a single one nothing can be told."""
    held_out_share: float = 0.2
    """Share of every domain's documents that losses are measured on, and nothing else."""
    max_tokens: int = 2_000
    """Most tokens of a source to fit its adapters with, held-out ones included."""
    tokens: int = 200_000
    """Most tokens of text to read, from the beginning of the corpus, which is balanced by domain;
    losses are of the held-out documents among them."""
    thresholds: tuple[float, ...] = (0.01, 0.02, 0.05)
    """Rises of the loss, as shares of it, up to which experts are taken out together."""
    tune_steps: int = 0
    """Steps of training the adapters alone, and the linear maps, on the loss of the model in the
    training documents; 0 leaves them as they were fitted to the outputs."""
    tune_rate: float = 1e-3
    """Adam's step on each of their numbers at the beginning of that; it falls to zero."""
    bootstrap: int = 1_000
    """Resamples of documents behind each 95% interval."""
    seed: int = 0
    """Seed of the documents held out, of fits, draws and resamples."""

    def __post_init__(self) -> None:
        lowest = {"sources": 1, "candidates": 1, "max_tokens": 1, "tokens": 1, "tune_steps": 0}
        lowest |= {"rank": 0, "bootstrap": 1}
        require_least(self, lowest)
        if not 1 <= self.random <= RANDOM_SEEDS:
            raise OptionError(
                "that many random draws there are not",
                got=self.random,
                expected=f"1 to {RANDOM_SEEDS}",
            )
        if not 0 < self.held_out_share < 1:
            raise OptionError(
                "held_out_share is not a share", got=self.held_out_share, expected="0 to 1"
            )
        if not self.forms:
            raise OptionError("there is no form of adapter to try")
        if not (self.thresholds and all(threshold > 0 for threshold in self.thresholds)):
            raise OptionError("thresholds are rises above 0", got=self.thresholds)
        if not self.tune_rate > 0:
            raise OptionError("tune_rate trains nothing", got=self.tune_rate, expected="above 0")

    @property
    def behind_losses(self) -> dict[str, object]:
        """Options that losses depend on, but for what is taken out and what stands in for it."""
        names = ("rank", "held_out_share", "max_tokens", "tokens", "seed")
        return {name: getattr(self, name) for name in names}

    def fit_options(self, form: AdapterForm) -> FitOptions:
        """How adapters of a form are fitted; random experts are fitted as targets of their own."""
        return FitOptions(form=form, rank=self.rank, controls=False, seed=self.seed)
