"""What a change of a model costs: loss by domain, paired differences, speed, harness tasks."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moescope.evaluate.answers import compare_answers as compare_answers
    from moescope.evaluate.harness import tasks as tasks
    from moescope.evaluate.paired import compare as compare
    from moescope.evaluate.timing import speed as speed
    from moescope.evaluate.unpaired import loss as loss
else:
    _HOMES = {
        "compare": "paired",
        "compare_answers": "answers",
        "loss": "unpaired",
        "speed": "timing",
        "tasks": "harness",
    }

    def __getattr__(name: str) -> Any:
        """The public functions, on first use."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
