"""About how much an alignment will take, before anything is captured."""

from moescope.alignment.capacity import RANKS
from moescope.alignment.learning import SHARES
from moescope.alignment.optimiser import PRODUCTS
from moescope.alignment.options import RANDOM_SEEDS, Form, SolverOptions
from moescope.alignment.published import STEPS, TOKENS
from moescope.analyses.align.options import AlignOptions, experts_of, layer_pairs
from moescope.models.view import MoELayer, MoEModel

FULL_MATRIX: tuple[Form, ...] = ("layer_norm", "linear", "orthogonal")
"""Forms whose steps take Muon's products of full matrices."""


def operations(model: MoEModel, options: AlignOptions) -> float:
    """Floating-point operations of all fits at most: early stopping and a budget make it less."""
    total = 0.0
    for pair in layer_pairs(model, options):
        source, target = model.layer(pair.source), model.layer(pair.target)
        sources = len(experts_of(source, options.source_experts))
        targets = len(experts_of(target, options.target_experts))
        total += sources * _of_source(target, targets, options)
    return total


def _of_source(target: MoELayer, targets: int, options: AlignOptions) -> float:
    """All fits of one source expert."""
    controls = RANDOM_SEEDS * (targets + 1) + 1 if options.controls else 0
    converged = _converged(target, options.form, options)
    train = min(TOKENS, (1 - options.held_out_share) * options.max_tokens)
    published = STEPS * train * _per_token(target)
    each = published if options.protocol == "published" else converged
    runs = len(SHARES) + 1 if options.learning_curve else 1
    fitted = runs * ((targets + controls) * each + targets * published)
    if options.capacity:
        low, full = (_converged(target, form, options) for form in ("low_rank", "layer_norm"))
        fitted += targets * (RANDOM_SEEDS + 2) * (len(RANKS) * low + full)
    return fitted


def _converged(target: MoELayer, form: Form, options: AlignOptions) -> float:
    """One fit by the converged protocol: steps, Muon's products, looks at the inner tokens."""
    if form == "identity":
        return 0.0
    solver = SolverOptions()
    train = (1 - options.held_out_share) * options.max_tokens
    looked_at = solver.inner_share * train / solver.evaluate_every / 3
    step = (solver.batch_tokens + looked_at) * _per_token(target)
    if form in FULL_MATRIX:
        step += PRODUCTS * 2 * target.hidden_size**3
    return solver.steps * step


def _per_token(target: MoELayer) -> float:
    """Forth and back through adapter and expert."""
    return 6.0 * target.hidden_size * (target.hidden_size + 3 * target.intermediate_size)
