"""What an analysis works on: a run, its capture, and model, weights and text when needed."""

import os
from functools import cached_property

from moescope.analyses.text import reopened, require_captured
from moescope.captures.read import Capture
from moescope.corpora.corpus import Corpus
from moescope.errors import CaptureError
from moescope.models.load import load
from moescope.models.on_disk import StoredLayers, in_memory, on_disk
from moescope.models.view import MoEModel
from moescope.runs import Run

IN_MEMORY = "in memory"


class Material:
    """A run folder opened for an analysis; capture and model load on first use.

    Args:
        run: The run folder.
        model: The captured model if it is loaded already; needed only where it was captured
            from memory, so that its weights cannot be found again.
        corpus: The captured text; needed only where it cannot be read again, such as token ids.
    """

    def __init__(
        self,
        run: Run | str | os.PathLike[str],
        model: MoEModel | None = None,
        corpus: Corpus | None = None,
    ) -> None:
        self.run = run if isinstance(run, Run) else Run(run)
        self._given_model = model
        self._given_corpus = corpus

    @cached_property
    def capture(self) -> Capture:
        """The recorded tensors."""
        return Capture(self.run)

    @cached_property
    def model(self) -> MoEModel:
        """The model that was captured.

        Raises:
            CaptureError: The model is another one than the captured, or cannot be found again.
        """
        model = self._given_model or self._loaded()
        if model.fingerprint != self.capture.model_fingerprint:
            raise CaptureError(
                f"{self.run.path} was captured from another model",
                got=f"{model.name} ({model.fingerprint[:12]})",
                expected=f"{self.capture.model_name} ({self.capture.model_fingerprint[:12]})",
                remedy="Pass the captured model, or capture this one into a new folder",
            )
        return model

    def text(self, tokens: int | None = None) -> Corpus:
        """The text that was captured, up to so many tokens.

        Args:
            tokens: Where to stop, as `Packing.max_tokens`; None reads all.

        Raises:
            CaptureError: The text is another one than the captured, or cannot be found again.
        """
        corpus = self._given_corpus
        if corpus is None:
            corpus = reopened(self.capture)
        else:
            require_captured(corpus, self.capture)
        return corpus if tokens is None else corpus.limited(tokens)

    @cached_property
    def layers(self) -> StoredLayers:
        """The layers of the model, to be read one at a time; it is not loaded for that.

        Raises:
            CaptureError: There is no capture that says which model, and none was passed.
            ModelError: The checkpoint cannot be read.
        """
        captured = Capture.exists(self.run)
        if self._given_model is not None:
            return in_memory(self.model if captured else self._given_model)
        if not captured:
            raise CaptureError(
                f"{self.run.path} holds no capture that says which model it is about",
                remedy="Name a checkpoint: `--checkpoint MODEL`",
            )
        self._require_checkpoint()
        return on_disk(
            self.capture.model_name,
            revision=self.capture.model_revision,
            dense_as_experts=self._is_dense,
        )

    def _loaded(self) -> MoEModel:
        self._require_checkpoint()
        return load(
            self.capture.model_name,
            revision=self.capture.model_revision,
            dtype=self.capture.manifest["model"]["dtype"],
            dense_as_experts=self._is_dense,
        )

    @property
    def _is_dense(self) -> bool:
        """Whether the feed-forward layers of a dense model were seen as experts."""
        return all(layer["family"] == "dense" for layer in self.capture.manifest["layers"])

    def _require_checkpoint(self) -> None:
        if self.capture.model_name == IN_MEMORY:
            raise CaptureError(
                f"{self.run.path} was captured from a model in memory",
                remedy="Pass it: `moescope.align(run, model=model, ...)`",
            )
