"""What the experts of a mixture-of-experts language model do, and which do the same thing.

The public names load on first use, so that `import moescope` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moescope import evaluate as evaluate
    from moescope.alignment.capacity import capacity_curve
    from moescope.alignment.fit import AlignmentResult, fit
    from moescope.alignment.learning import learning_curve
    from moescope.alignment.options import FitOptions
    from moescope.alignment.pairs import fit_pairs
    from moescope.alignment.samples import Samples
    from moescope.analyses.align.analysis import align
    from moescope.analyses.atlas.analysis import atlas
    from moescope.analyses.attribute.analysis import attribute
    from moescope.analyses.clusters.analysis import clusters
    from moescope.analyses.damage.analysis import damage
    from moescope.analyses.depth.analysis import depth
    from moescope.analyses.ensemble.analysis import ensemble
    from moescope.analyses.health.analysis import health
    from moescope.analyses.lens.analysis import lens
    from moescope.analyses.neurons.analysis import neurons
    from moescope.analyses.ood.analysis import ood
    from moescope.analyses.outputs.analysis import outputs
    from moescope.analyses.prune_domain.analysis import prune_domain
    from moescope.analyses.reroute.analysis import reroute
    from moescope.analyses.routing.analysis import routing
    from moescope.analyses.substitute.analysis import substitute
    from moescope.analyses.swap_blocks.analysis import swap_blocks
    from moescope.analyses.swap_experts.analysis import swap_experts
    from moescope.analyses.topk.analysis import topk
    from moescope.analyses.tuned_lens.analysis import tuned_lens
    from moescope.analyses.weights.analysis import weights
    from moescope.captures.read import Capture
    from moescope.captures.record import capture
    from moescope.comparison import compare
    from moescope.corpora.corpus import Corpus
    from moescope.corpora.questions import Questions
    from moescope.errors import MoEScopeError
    from moescope.experts.adapter import Adapter
    from moescope.experts.weights import ExpertWeights
    from moescope.models.conformance import conformance
    from moescope.models.inspection import inspect
    from moescope.models.load import load
    from moescope.models.view import MoELayer, MoEModel, Routing
    from moescope.reports.write import report
    from moescope.reproduction import reproduce
    from moescope.runs import Result, Run
    from moescope.scheduler import study

__version__ = "0.1.0"

_HOMES = {
    "Adapter": "experts.adapter",
    "AlignmentResult": "alignment.fit",
    "Capture": "captures.read",
    "Corpus": "corpora.corpus",
    "ExpertWeights": "experts.weights",
    "FitOptions": "alignment.options",
    "MoELayer": "models.view",
    "MoEModel": "models.view",
    "MoEScopeError": "errors",
    "Questions": "corpora.questions",
    "Result": "runs",
    "Routing": "models.view",
    "Run": "runs",
    "Samples": "alignment.samples",
    "align": "analyses.align.analysis",
    "atlas": "analyses.atlas.analysis",
    "attribute": "analyses.attribute.analysis",
    "capacity_curve": "alignment.capacity",
    "capture": "captures.record",
    "clusters": "analyses.clusters.analysis",
    "compare": "comparison",
    "conformance": "models.conformance",
    "damage": "analyses.damage.analysis",
    "depth": "analyses.depth.analysis",
    "ensemble": "analyses.ensemble.analysis",
    "fit": "alignment.fit",
    "fit_pairs": "alignment.pairs",
    "health": "analyses.health.analysis",
    "inspect": "models.inspection",
    "learning_curve": "alignment.learning",
    "lens": "analyses.lens.analysis",
    "load": "models.load",
    "neurons": "analyses.neurons.analysis",
    "ood": "analyses.ood.analysis",
    "outputs": "analyses.outputs.analysis",
    "prune_domain": "analyses.prune_domain.analysis",
    "report": "reports.write",
    "reproduce": "reproduction",
    "reroute": "analyses.reroute.analysis",
    "routing": "analyses.routing.analysis",
    "study": "scheduler",
    "substitute": "analyses.substitute.analysis",
    "swap_blocks": "analyses.swap_blocks.analysis",
    "swap_experts": "analyses.swap_experts.analysis",
    "topk": "analyses.topk.analysis",
    "tuned_lens": "analyses.tuned_lens.analysis",
    "weights": "analyses.weights.analysis",
}
_ROOMS = ("evaluate",)  # opened by name, such as `moescope.evaluate.loss`

__all__ = [
    "Adapter",
    "AlignmentResult",
    "Capture",
    "Corpus",
    "ExpertWeights",
    "FitOptions",
    "MoELayer",
    "MoEModel",
    "MoEScopeError",
    "Questions",
    "Result",
    "Routing",
    "Run",
    "Samples",
    "__version__",
    "align",
    "atlas",
    "attribute",
    "capacity_curve",
    "capture",
    "clusters",
    "compare",
    "conformance",
    "damage",
    "depth",
    "ensemble",
    "fit",
    "fit_pairs",
    "health",
    "inspect",
    "learning_curve",
    "lens",
    "load",
    "neurons",
    "ood",
    "outputs",
    "prune_domain",
    "report",
    "reproduce",
    "reroute",
    "routing",
    "study",
    "substitute",
    "swap_blocks",
    "swap_experts",
    "topk",
    "tuned_lens",
    "weights",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"moescope.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'moescope' has no attribute {name!r}")
    value = getattr(import_module(f"moescope.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, *_ROOMS]
