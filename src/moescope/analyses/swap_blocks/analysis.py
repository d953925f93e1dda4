"""What exchanging the blocks of two layers changes (MoE Align)."""

from moescope.analyses.material import Material
from moescope.analyses.registry import analysis
from moescope.analyses.swap_blocks.decay import decay_table
from moescope.analyses.swap_blocks.findings import against_left_out, findings
from moescope.analyses.swap_blocks.kept import Kept
from moescope.analyses.swap_blocks.options import SwapBlocksOptions, layers_of, pairs_of
from moescope.analyses.swap_blocks.passes import read_unchanged, run_swaps
from moescope.analyses.swap_blocks.reading import Reading, basis, kept_of, reading_of
from moescope.analyses.swap_blocks.routing import distortion_table, shares_table
from moescope.analyses.swap_blocks.swaps import block_swaps, left_out, shown_swaps
from moescope.analyses.swap_blocks.tables import change_table
from moescope.analyses.work import parameters_met
from moescope.models.view import MoEModel
from moescope.runs import Result


def operations(model: MoEModel, options: SwapBlocksOptions) -> float:
    """Floating-point operations of all passes; of questions a guess at their length."""
    swaps = pairs_of(model, options.stack)
    if options.left_out:
        swaps += len(model.layers)
    tokens = 40 * options.most_questions if options.questions else options.tokens
    return 2.0 * parameters_met(model) * tokens * (1 + swaps)


@analysis(
    question="Can the sparse blocks of two layers change places?",
    source="MoE Align (block swap, Table 2 and Figure 2); intervals, noise floor and decay ours",
    needs={"live model"},
    options=SwapBlocksOptions,
    work=operations,
    basis=basis,
)
def swap_blocks(material: Material, options: SwapBlocksOptions) -> Result:
    """Loss, accuracy and routing with every pair of layers of a stack exchanged."""
    return swapped_blocks(
        material.model, reading_of(material, options), options, kept_of(material, options)
    )


def swapped_blocks(
    model: MoEModel, reading: Reading, options: SwapBlocksOptions, kept: Kept | None = None
) -> Result:
    """The same for any model, on a text or on questions.

    Raises:
        ModelError: The stack has fewer than two sparse layers.
        OptionError: No two blocks can be exchanged, or there is no swap that is to be shown.
    """
    layers = layers_of(model, options.stack)
    planned = block_swaps(layers, options.experts_only)
    shown = shown_swaps(layers, planned, options)
    baseline = read_unchanged(model, reading, kept)
    swaps = run_swaps(model, reading, planned, baseline, kept)
    unchanged = [
        {"swap": "none", "stack": layer.stack, "layer": layer.index, "other_layer": layer.index}
        for layer in layers
    ]
    table = change_table(swaps, options, unchanged)
    distortion = distortion_table(swaps, shown, options.seed)
    decay = decay_table(swaps, options)
    tables = {
        "swap-blocks": table,
        "routing": shares_table(swaps, shown),
        "distortion": distortion,
        "decay": decay,
    }
    said = findings(table, distortion, decay, options)
    if options.left_out:
        without = run_swaps(model, reading, left_out(layers), baseline, kept)
        tables["left-out"] = change_table(without, options)
        said += against_left_out(table, tables["left-out"])
    return Result(
        name="swap-blocks",
        tables=tables,
        findings=said,
        provenance={"seed": options.seed},
    )
