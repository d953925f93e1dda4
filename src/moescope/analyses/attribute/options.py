"""What can be set about `attribute`."""

from dataclasses import dataclass

from moescope.errors import OptionError, require_least


@dataclass(frozen=True, kw_only=True)
class AttributeOptions:
    """Options of `attribute`."""

    prompt: str | None = None
    """One text to be continued."""
    answer: str | None = None
    """What it should go on with; its first token counts. The model's most probable token if left
    out."""
    facts: str | None = None
    """Many of them: a CSV, TSV or JSON-lines file with the fields `prompt` and `answer`."""
    prompts: int = 64
    """Where neither prompt nor facts are given: how many places of the captured text to take, each
    of another document, with the next token as the answer."""
    context: int = 48
    """Tokens of text before such a place, at most."""
    controls: int = 64
    """With a prompt or facts: at how many such places experts are ablated for comparison; 0 for
    none."""
    shuffles: int = 2_000
    """Shuffles of the answers between the prompts behind each p."""
    bootstrap: int = 1_000
    """Resamples of prompts behind each 95% interval."""
    seed: int = 0
    """Seed of the places, the shuffles and the resamples."""

    def __post_init__(self) -> None:
        require_least(self, {"prompts": 1, "context": 1, "controls": 0, "shuffles": 1})
        if self.prompt is not None and self.facts is not None:
            raise OptionError("give a prompt or a file of facts, not both")
        if self.answer is not None and self.prompt is None:
            raise OptionError("there is an answer, but no prompt", remedy="Give one with --prompt")
