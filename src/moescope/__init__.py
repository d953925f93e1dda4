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
    from moescope.analyses.align import align
    from moescope.analyses.attribute import attribute
    from moescope.analyses.depth import depth
    from moescope.analyses.ensemble import ensemble
    from moescope.analyses.health import health
    from moescope.analyses.lens import lens
    from moescope.analyses.neurons import neurons
    from moescope.analyses.outputs import outputs
    from moescope.analyses.prune_domain import prune_domain
    from moescope.analyses.routing import routing
    from moescope.analyses.topk import topk
    from moescope.analyses.tuned_lens import tuned_lens
    from moescope.analyses.weights import weights
    from moescope.captures.read import Capture
    from moescope.captures.record import capture
    from moescope.comparison import compare
    from moescope.corpora.corpus import Corpus
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
    "Result": "runs",
    "Routing": "models.view",
    "Run": "runs",
    "Samples": "alignment.samples",
    "align": "analyses.align",
    "attribute": "analyses.attribute",
    "capacity_curve": "alignment.capacity",
    "capture": "captures.record",
    "compare": "comparison",
    "conformance": "models.conformance",
    "depth": "analyses.depth",
    "ensemble": "analyses.ensemble",
    "fit": "alignment.fit",
    "fit_pairs": "alignment.pairs",
    "health": "analyses.health",
    "inspect": "models.inspection",
    "learning_curve": "alignment.learning",
    "lens": "analyses.lens",
    "load": "models.load",
    "neurons": "analyses.neurons",
    "outputs": "analyses.outputs",
    "prune_domain": "analyses.prune_domain",
    "report": "reports.write",
    "reproduce": "reproduction",
    "routing": "analyses.routing",
    "study": "scheduler",
    "topk": "analyses.topk",
    "tuned_lens": "analyses.tuned_lens",
    "weights": "analyses.weights",
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
    "Result",
    "Routing",
    "Run",
    "Samples",
    "__version__",
    "align",
    "attribute",
    "capacity_curve",
    "capture",
    "compare",
    "conformance",
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
    "outputs",
    "prune_domain",
    "report",
    "reproduce",
    "routing",
    "study",
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
