"""The registry of analyses: what each asks, what it needs, how it is called."""

import dataclasses
import json
import os
from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, Generic, Literal, TypeVar, get_args

from moescope import analyses
from moescope.analyses.curves import Curve
from moescope.analyses.material import Material
from moescope.config import build
from moescope.corpora.corpus import Corpus
from moescope.errors import OptionError, unknown
from moescope.models.view import MoEModel
from moescope.runs import Result, Run, library_versions, to_json

Need = Literal[
    "weights",
    "routing",
    "inputs",
    "residual",
    "shared_output",
    "token_loss",
    "live model",
]
Options = TypeVar("Options")
Compute = Callable[[Material, Options], Result]
Basis = Callable[[Material, Options], dict[str, Any]]

_REGISTRY: dict[str, "Analysis[Any]"] = {}


def of_capture(material: Material, _: object) -> dict[str, Any]:
    """What a result of a capture rests on, for its provenance."""
    capture = material.capture
    return {
        "model": capture.model_name,
        "model_revision": capture.model_revision,
        "model_fingerprint": capture.model_fingerprint,
        "capture": capture.digest,
        "tokens": capture.num_tokens,
        "documents": len(capture.document_names),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Analysis(Generic[Options]):
    """A question, and the function that answers it. Call it with a run and options."""

    name: str
    """Its name: subcommand, function and result file."""
    question: str
    """What it answers, in one sentence."""
    source: str
    """The study the question comes from."""
    needs: frozenset[Need]
    """What must be captured, or present, before it runs."""
    options: type[Options]
    """Dataclass of its options."""
    compute: Compute[Options]
    """The function: material and options in, result out."""
    work: Callable[[MoEModel, Options], float] | None = None
    """About how many floating-point operations it takes; None where that is little."""
    plan: Callable[[MoEModel, Options], Any] | None = None
    """What it would do and take, as an object that prints itself and has `as_dict`; None where
    `work` says enough."""
    curves: tuple[Curve, ...] = ()
    """Its measures with one value per layer, for `depth` and `moescope compare`."""
    basis: Basis[Options] = of_capture
    """What a result rests on: part of its provenance, without which it would be another."""

    def __call__(
        self,
        run: Run | str | os.PathLike[str],
        *,
        model: MoEModel | None = None,
        corpus: Corpus | None = None,
        **options: Any,
    ) -> Result:
        """Answer the question for a run, save the result there and return it.

        Args:
            run: A run folder; with a capture, unless the analysis reads a checkpoint alone.
            model: The captured model if it is in memory already.
            corpus: The captured text where it cannot be read again, such as token ids.
            **options: Fields of this analysis' options.

        Raises:
            OptionError: An unknown or unfit option.
            CaptureError: The capture is missing, damaged, or lacks a tensor this analysis needs.
        """
        return self.run(Material(run, model, corpus), build(self.options, options, self.name))

    def run(self, material: Material, options: Options) -> Result:
        """The same with options built already."""
        result = self.compute(material, options)
        provenance = self._provenance(material, options) | dict(result.provenance)
        result = dataclasses.replace(result, provenance=provenance)
        result.save(material.run.results_folder)
        return result

    def is_done(self, material: Material, options: Options) -> bool:
        """Whether the run holds this result, of the same capture, options and versions."""
        if self.name not in material.run.results():
            return False
        found = material.run.result(self.name).provenance
        asked = json.loads(to_json(self._provenance(material, options)))
        return all(found.get(key) == value for key, value in asked.items())

    def _provenance(self, material: Material, options: Options) -> dict[str, Any]:
        return {
            "analysis": self.name,
            "options": dataclasses.asdict(options),  # type: ignore[call-overload]
            **self.basis(material, options),
            "libraries": library_versions(),
        }


def analysis(
    *,
    question: str,
    source: str,
    needs: set[Need],
    options: type[Options],
    work: Callable[[MoEModel, Options], float] | None = None,
    plan: Callable[[MoEModel, Options], Any] | None = None,
    curves: tuple[Curve, ...] = (),
    basis: Basis[Options] = of_capture,
) -> Callable[[Compute[Options]], Analysis[Options]]:
    """Register the decorated function under its own name.

    Raises:
        OptionError: The name is taken.
    """
    assert needs <= set(get_args(Need)), needs

    def register(compute: Compute[Options]) -> Analysis[Options]:
        name = compute.__name__.replace("_", "-")
        if name in _REGISTRY:
            raise OptionError(f"two analyses are called {name!r}")
        _REGISTRY[name] = Analysis(
            name=name,
            question=question,
            source=source,
            needs=frozenset(needs),
            options=options,
            compute=compute,
            work=work,
            plan=plan,
            curves=curves,
            basis=basis,
        )
        return _REGISTRY[name]

    return register


def all_analyses() -> dict[str, Analysis[Any]]:
    """Every analysis by name; each lives in a folder of this one and registers itself."""
    for module in iter_modules(analyses.__path__):
        if module.ispkg:
            import_module(f"{analyses.__name__}.{module.name}.analysis")
    return dict(sorted(_REGISTRY.items()))


def find(name: str) -> Analysis[Any]:
    """The analysis of this name.

    Raises:
        OptionError: There is none; the message suggests the nearest.
    """
    known = all_analyses()
    if name not in known:
        raise unknown("analysis", name, known)
    return known[name]
