"""The text of a capture, once more: for what has to be computed on the model itself."""

from moescope.captures.read import Capture
from moescope.corpora.corpus import Corpus
from moescope.corpora.packing import Packing
from moescope.errors import CaptureError, CorpusError


def reopened(capture: Capture) -> Corpus:
    """The corpus that was captured, packed as it was.

    Args:
        capture: Its manifest names sources, their content and the packing.

    Raises:
        CaptureError: The corpus was given as token ids or cannot be found again, or its content
            changed since.
    """
    recorded = capture.manifest["corpus"]
    sources = {domain: recorded["sources"][domain]["source"] for domain in capture.domains}
    try:
        corpus = Corpus.from_sources(sources, Packing(**recorded["packing"]))
        require_captured(corpus, capture)
    except CorpusError as error:
        raise CaptureError(
            f"the text of {capture.folder} cannot be opened again",
            got=str(error),
            remedy="Put it back where it was, or pass it: `moescope.topk(run, corpus=corpus)`",
        ) from error
    return corpus


def require_captured(corpus: Corpus, capture: Capture) -> None:
    """Refuse a corpus that is not the captured one.

    Raises:
        CaptureError: Its sources, their content or their packing are others.
        CorpusError: It cannot be read.
    """
    recorded, found = capture.manifest["corpus"], corpus.description
    changed = [
        domain
        for domain in {**recorded["sources"], **found["sources"]}
        if recorded["sources"].get(domain) != found["sources"].get(domain)
    ]
    if changed or recorded["packing"] != found["packing"]:
        raise CaptureError(
            f"the text changed since {capture.folder} was captured",
            got=f"other content in {', '.join(changed)}" if changed else "another packing",
            remedy="Restore it, or capture it into a new folder",
        )
