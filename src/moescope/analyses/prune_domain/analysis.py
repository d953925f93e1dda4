"""What is lost, there and elsewhere, with the experts that one domain uses (MoE Lens)."""

from collections.abc import Sequence

import numpy as np

from moescope.analyses.material import Material
from moescope.analyses.prune_domain.choice import possible_counts, size_of_share
from moescope.analyses.prune_domain.findings import findings
from moescope.analyses.prune_domain.options import PruneDomainOptions, Setting
from moescope.analyses.prune_domain.saving import operations, saving_table
from moescope.analyses.prune_domain.sweep import plan, sweep
from moescope.analyses.prune_domain.tables import against_table, choice_table, loss_table
from moescope.analyses.prune_domain.text import halves
from moescope.analyses.prune_domain.use import Unpruned, read
from moescope.analyses.registry import analysis
from moescope.corpora.corpus import RESERVED_DOMAIN, Corpus
from moescope.errors import OptionError, unknown
from moescope.evaluate.predictions import require_decoder_only
from moescope.evaluate.totals import Resampling
from moescope.models.view import MoEModel
from moescope.runs import Result


@analysis(
    question="What is lost and saved with only the experts that one domain uses?",
    source="MoE Lens (targeted pruning); split, random and pooled choices, and intervals ours",
    needs={"live model"},
    options=PruneDomainOptions,
    work=operations,
)
def prune_domain(material: Material, options: PruneDomainOptions) -> Result:
    """Loss by domain with experts chosen for each domain, for all text, or at random."""
    return pruned_losses(material.model, material.text(options.tokens), options)


def pruned_losses(model: MoEModel, corpus: Corpus, options: PruneDomainOptions) -> Result:
    """The same for any model and text.

    Raises:
        CorpusError: The text cannot be read, or a domain has too few documents to split.
        ModelError: The model is an encoder-decoder.
        OptionError: An unknown domain, or a size that does not fit the model.
    """
    require_decoder_only(model)
    domains = _domains(corpus, options)
    parts = halves(corpus, model.tokenizer, options.seed)
    text = [read(model, part, corpus.domains, options.criterion) for part in parts]
    sizes = _sizes(model, text, domains, options)
    several = len(corpus.domains) > 1
    chosen_for = [*domains, RESERVED_DOMAIN] if several else domains
    planned = plan(model, text, list(sizes), chosen_for, options)
    totals = sweep(model, text, planned, corpus.domains)
    resampling = Resampling(resamples=options.bootstrap, seed=options.seed)
    one_of_each = {count: planned[Setting("domain", domains[0], count)][0] for count in sizes}
    saving = saving_table(model, one_of_each, corpus.packing.length, options.seed)
    tables = {
        "prune-domain": loss_table(totals, resampling),
        "against": against_table(totals, corpus.domains, resampling),
        "choice": choice_table(text, list(sizes), chosen_for, options.criterion),
        "saving": saving.assign(share=saving["kept"].map(sizes)),
    }
    return Result(
        name="prune-domain",
        tables=tables,
        findings=findings(tables, options.shares),
        provenance={"seed": options.seed},
    )


def _domains(corpus: Corpus, options: PruneDomainOptions) -> list[str]:
    for domain in options.domains:
        if domain not in corpus.domains:
            raise unknown("domain", domain, corpus.domains)
    return [name for name in corpus.domains if name in (options.domains or corpus.domains)]


def _sizes(
    model: MoEModel, text: Sequence[Unpruned], domains: Sequence[str], options: PruneDomainOptions
) -> dict[int, float]:
    """Each with the share that asked for it, NaN if none did."""
    possible = possible_counts(model.layers)
    for count in options.counts:
        if count not in possible:
            raise OptionError(
                "not every layer can keep that many experts and leave some out",
                got=count,
                expected=", ".join(map(str, possible)) or "none: the router takes all there are",
            )
    uses = [part.use for part in text]
    found = dict.fromkeys(options.counts, np.nan)
    for share in () if options.counts else sorted(options.shares):
        size = size_of_share(possible, uses, domains, share)
        if size is not None:
            found[size] = share
    if not found:
        raise OptionError(
            "nothing can be pruned: these shares take all experts of some layer",
            got=", ".join(map(str, options.shares)),
            remedy="Lower shares, or name counts",
        )
    return dict(sorted(found.items()))
