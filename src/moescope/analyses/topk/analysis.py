"""How much the model loses with fewer experts per token, and what that saves (MoE Lens)."""

from moescope.analyses.material import Material
from moescope.analyses.registry import analysis
from moescope.analyses.topk.cost import cost_table, operations
from moescope.analyses.topk.findings import findings
from moescope.analyses.topk.options import TopkOptions, settings_of
from moescope.analyses.topk.sweep import sweep
from moescope.analyses.topk.tables import loss_table, published_table, with_loss
from moescope.corpora.corpus import Corpus
from moescope.evaluate.totals import Resampling
from moescope.models.view import MoEModel
from moescope.runs import Result


@analysis(
    question="How much worse does the model predict with fewer experts per token?",
    source="MoE Lens (top-k restriction); weightings, paired intervals and cost ours",
    needs={"live model"},
    options=TopkOptions,
    work=operations,
)
def topk(material: Material, options: TopkOptions) -> Result:
    """Loss by domain with 0 to K routed experts per token, all layers at once or one at a time."""
    return curves(material.model, material.text(options.tokens), options)


def curves(model: MoEModel, corpus: Corpus, options: TopkOptions) -> Result:
    """The same for any model and text.

    Raises:
        CorpusError: The text cannot be read, or holds nothing to predict.
        ModelError: The model is an encoder-decoder.
        OptionError: A number of experts that no layer can use.
    """
    settings = settings_of(model, options)
    totals = sweep(model, corpus, settings)
    losses = loss_table(totals, Resampling(resamples=options.bootstrap, seed=options.seed))
    ks = {setting.k for setting in settings if setting.layer is None}
    cost = cost_table(model, sorted(ks), corpus.packing.length, options.seed)
    published = published_table(totals)
    return Result(
        name="topk",
        tables={"topk": losses, "cost": with_loss(cost, losses), "published": published},
        findings=findings(losses, cost, published),
        provenance={"seed": options.seed},
    )
