"""What the manifest of a capture says."""

import hashlib
import html
from functools import cached_property
from pathlib import Path
from typing import Any

from moescope.captures.partial import MANIFEST, read_manifest
from moescope.captures.places import Place
from moescope.captures.shards import Entry
from moescope.errors import CaptureError
from moescope.models.view import Stack


class CaptureFacts:
    """What is known of a capture before any tensor is read.

    Args:
        folder: The folder of the capture.
        stack: Whose layers to speak of.

    Raises:
        CaptureError: There is no complete capture; no layer of the stack was recorded.
    """

    def __init__(self, folder: Path, stack: Stack) -> None:
        self.folder = folder
        self.stack: Stack = stack
        self.manifest: dict[str, Any] = read_manifest(folder)
        if not self._layers:
            raise CaptureError(
                f"{folder} holds no layer of the {stack}",
                expected=" or ".join(sorted({place.stack for place in self.places})),
            )

    @property
    def places(self) -> list[Place]:
        """Every recorded layer of either stack, in the order of the manifest."""
        return [Place(_stack(layer), layer["index"]) for layer in self.manifest["layers"]]

    @property
    def layers(self) -> list[int]:
        """The model's own numbers of the recorded layers of the stack, ascending."""
        return [layer["index"] for layer in self._layers]

    @property
    def recorded(self) -> list[str]:
        """Names of the recorded tensors."""
        return list(self.manifest["options"]["record"])

    @property
    def domains(self) -> list[str]:
        """Names of the domains."""
        return list(self.manifest["domains"])

    @property
    def num_tokens(self) -> int:
        """T, the number of tokens."""
        return int(self.manifest["num_tokens"])

    @property
    def seed(self) -> int:
        """Seed of the sample."""
        return int(self.manifest["options"]["seed"])

    @property
    def model_name(self) -> str:
        """What was loaded: Hub id, folder, or name of a reference model."""
        return str(self.manifest["model"]["name"])

    @property
    def model_fingerprint(self) -> str:
        """SHA-256 of the model's configuration and weights, as `MoEModel.fingerprint`."""
        return str(self.manifest["model"]["fingerprint"])

    @property
    def model_revision(self) -> str | None:
        """Commit on the Hub, if the model came from there."""
        revision = self.manifest["model"]["revision"]
        return None if revision is None else str(revision)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the manifest, which names the checksum of every shard."""
        return hashlib.sha256((self.folder / MANIFEST).read_bytes()).hexdigest()

    def layer_facts(self, layer: int) -> dict[str, Any]:
        """Family, `num_experts`, `top_k`, `hidden_size` and `intermediate_size` of a layer.

        And `unused_slots`: of T x `top_k` those that no expert was used for, for lack of capacity.

        Raises:
            CaptureError: The layer was not recorded.
        """
        for facts in self._layers:
            if facts["index"] == layer:
                return {"unused_slots": 0, **facts}
        raise CaptureError(
            f"layer {layer} is not in {self.folder}",
            expected=f"one of {', '.join(map(str, self.layers))}",
            remedy="Capture again with that layer",
        )

    @cached_property
    def _layers(self) -> list[dict[str, Any]]:
        """What the manifest says of the layers of the stack."""
        return [layer for layer in self.manifest["layers"] if _stack(layer) == self.stack]

    def _shards(self, kind: str) -> list[Entry]:
        return [entry for entry in self.manifest["shards"] if entry["kind"] == kind]

    @property
    def _per_expert(self) -> int:
        return int(self.manifest["options"]["tokens_per_expert"])

    def _require(self, name: str) -> None:
        if name not in self.recorded:
            raise CaptureError(
                f"{self.folder} lacks the tensor {name!r}",
                got=", ".join(self.recorded),
                remedy=f"Capture again, with --record {' '.join([*self.recorded, name])}",
            )

    def _require_samples(self) -> None:
        if not self._per_expert:
            raise CaptureError(
                f"{self.folder} holds no samples of experts, whole rows alone",
                remedy="Capture with tokens_per_expert above 0",
            )

    def _require_expert(self, layer: int, expert: int) -> None:
        count = self.layer_facts(layer)["num_experts"]
        if not 0 <= expert < count:
            raise CaptureError(
                f"layer {layer} has no such expert", got=expert, expected=f"0 to {count - 1}"
            )

    def _facts(self) -> dict[str, str]:
        return {
            "model": self.model_name,
            "domains": ", ".join(self.domains),
            "tokens": f"{self.num_tokens:,}",
            "documents": f"{self.manifest['num_documents']:,}",
            "layers": ", ".join(map(str, self.layers)),
            "recorded": ", ".join(self.recorded),
        }

    def __repr__(self) -> str:
        facts = "; ".join(f"{name} {fact}" for name, fact in self._facts().items())
        return f"Capture({str(self.folder)!r}: {facts})"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th>{html.escape(name)}</th><td>{html.escape(fact)}</td></tr>"
            for name, fact in self._facts().items()
        )
        return f"<h3>Capture</h3><table>{rows}</table>"


def _stack(layer: dict[str, Any]) -> Stack:
    """That of a layer in the manifest; version 1 knew decoders only."""
    found: Stack = layer.get("stack", "decoder")
    return found
