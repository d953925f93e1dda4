"""What exchanging single experts of two layers changes (MoE Align)."""

from math import comb

from moescope.analyses.material import Material
from moescope.analyses.registry import analysis
from moescope.analyses.swap_blocks.cost import reading_operations
from moescope.analyses.swap_blocks.decay import decay_table
from moescope.analyses.swap_blocks.findings import findings
from moescope.analyses.swap_blocks.kept import Kept
from moescope.analyses.swap_blocks.options import layers_of, sparse_layers
from moescope.analyses.swap_blocks.passes import read_unchanged, run_swaps
from moescope.analyses.swap_blocks.reading import Reading, basis, kept_of, reading_of
from moescope.analyses.swap_blocks.routing import distortion_table, shares_table
from moescope.analyses.swap_blocks.tables import change_table
from moescope.analyses.swap_experts.options import SwapExpertsOptions
from moescope.analyses.swap_experts.swaps import expert_swaps
from moescope.models.view import MoEModel
from moescope.runs import Result

_SHOWN = 3


def operations(model: MoEModel, options: SwapExpertsOptions) -> float:
    """Floating-point operations with every pair of experts."""
    swaps = len(options.pairs) or comb(len(sparse_layers(model, options.stack)[1]), 2)
    if options.layers:
        swaps = model.layers[0].num_experts ** 2
    return reading_operations(model, options, swaps)


@analysis(
    question="Can single experts of two layers change places?",
    source="MoE Align (swap of the most used experts); other pairs, intervals and routing ours",
    needs={"live model"},
    options=SwapExpertsOptions,
    work=operations,
    basis=basis,
)
def swap_experts(material: Material, options: SwapExpertsOptions) -> Result:
    """Loss, accuracy and routing with pairs of experts exchanged."""
    return swapped_experts(
        material.model, reading_of(material, options), options, kept_of(material, options)
    )


def swapped_experts(
    model: MoEModel, reading: Reading, options: SwapExpertsOptions, kept: Kept | None = None
) -> Result:
    """The same for any model, on a text or on questions.

    Raises:
        ModelError: The stack has fewer than two sparse layers.
        OptionError: No two experts can be exchanged, or there is no such layer or expert.
    """
    layers = layers_of(model, options.stack)
    baseline = read_unchanged(model, reading, kept)
    swaps = run_swaps(model, reading, expert_swaps(layers, options, baseline), baseline, kept)
    shown = [swap.name for swap in swaps.measured][:_SHOWN]
    table = change_table(swaps, options)
    distortion = distortion_table(swaps, shown, options.seed)
    decay = decay_table(swaps, options)
    return Result(
        name="swap-experts",
        tables={
            "swap-experts": table,
            "routing": shares_table(swaps, shown),
            "distortion": distortion,
            "decay": decay,
        },
        findings=findings(table, distortion, decay, options),
        provenance={"seed": options.seed},
    )
