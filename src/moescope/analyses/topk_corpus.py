"""The text of a capture, once more: for what has to be computed on the model itself."""

from dataclasses import replace

from moescope.captures.read import Capture
from moescope.corpora.corpus import Corpus
from moescope.corpora.packing import Packing
from moescope.errors import CaptureError, CorpusError


def reopened(capture: Capture, tokens: int) -> Corpus:
    """The corpus that was captured, packed as it was, up to so many tokens.

    Args:
        capture: Its manifest names sources, their content and the packing.
        tokens: Where to stop, as `Packing.max_tokens`.

    Raises:
        CaptureError: The corpus was given as token ids or cannot be found again, or its content
            changed since.
    """
    recorded = capture.manifest["corpus"]
    sources = {domain: recorded["sources"][domain]["source"] for domain in capture.domains}
    packing = Packing(**recorded["packing"])
    try:
        corpus = Corpus.from_sources(sources, packing)
        found = corpus.description["sources"]
    except CorpusError as error:
        raise CaptureError(
            f"the text of {capture.folder} cannot be opened again",
            got=str(error),
            remedy="Put it back where it was, or capture a corpus that is read from files",
        ) from error
    if changed := [domain for domain in found if found[domain] != recorded["sources"][domain]]:
        raise CaptureError(
            f"the text changed since {capture.folder} was captured",
            got=f"other content in {', '.join(changed)}",
            remedy="Restore it, or capture it into a new folder",
        )
    most = min(tokens, packing.max_tokens or tokens)
    return Corpus.from_sources(sources, replace(packing, max_tokens=most))
