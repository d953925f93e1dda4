"""Models in, one view over every family, and the proof that the view is right."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moescope.experts.weights import ExpertWeights as ExpertWeights
else:

    def __getattr__(name: str) -> Any:
        """`ExpertWeights`, what `MoELayer.expert_weights` returns, on first use."""
        if name != "ExpertWeights":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from moescope.experts.weights import ExpertWeights

        return ExpertWeights
