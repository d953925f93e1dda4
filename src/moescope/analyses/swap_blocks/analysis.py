"""What exchanging the blocks of two layers changes (MoE Align)."""

from math import comb

from moescope.analyses.material import Material
from moescope.analyses.registry import analysis
from moescope.analyses.swap_blocks.cost import reading_operations
from moescope.analyses.swap_blocks.decay import decay_table
from moescope.analyses.swap_blocks.findings import against_left_out, findings
from moescope.analyses.swap_blocks.kept import Kept
from moescope.analyses.swap_blocks.options import SwapBlocksOptions, layers_of, sparse_layers
from moescope.analyses.swap_blocks.passes import read_unchanged, run_swaps
from moescope.analyses.swap_blocks.reading import Reading, basis, kept_of, reading_of
from moescope.analyses.swap_blocks.routing import distortion_table, shares_table
from moescope.analyses.swap_blocks.swaps import block_swaps, left_out, shown_swaps
from moescope.analyses.swap_blocks.tables import change_table
from moescope.models.view import MoEModel
from moescope.runs import Result


def operations(model: MoEModel, options: SwapBlocksOptions) -> float:
    """Floating-point operations with every pair of blocks, and without each layer if asked for."""
    layers = len(sparse_layers(model, options.stack)[1])
    return reading_operations(model, options, comb(layers, 2) + options.left_out * layers)


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
