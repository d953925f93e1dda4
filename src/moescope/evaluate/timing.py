"""How long a forward pass takes, what it holds in memory, and how many parameters a token meets."""

import time
from contextlib import nullcontext

import numpy as np
import pandas as pd
import psutil
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from moescope.errors import ModelError
from moescope.evaluate.paired import BASELINE, Interventions, check_interventions
from moescope.evaluate.predictions import evaluating, require_decoder_only
from moescope.models.observe import Observation, observe
from moescope.models.view import MoELayer, MoEModel
from moescope.progress import track

_NONE: Interventions = {}
_WARM_UP = 2  # passes before the first that counts


def speed(
    model: MoEModel,
    interventions: Interventions = _NONE,
    *,
    rows: int = 4,
    length: int = 128,
    repeats: int = 10,
    seed: int = 0,
) -> pd.DataFrame:
    """Time of whole forward passes over fixed random tokens, interleaved, and memory beside it.

    A pass reads `rows * length` tokens at once, with the head and without a cache: this is the
    speed of reading a text, not of writing one token after the other. Each round times the model
    as it is and every changed one in turn. The clock runs from the call to the logits, on an
    accelerator until it is done; entering an intervention is not timed.

    Args:
        model: The model; it is put into evaluation mode meanwhile.
        interventions: What to compare with, as in `compare`.
        rows: Rows of tokens per pass.
        length: Tokens per row.
        repeats: Rounds that count; two more come first, to warm up.
        seed: Seed of the tokens.

    Returns:
        One row per intervention, the first of them "baseline": intervention; seconds_per_token,
        the median over the rounds, and its quartiles _low and _high; ratio, the median over the
        rounds of the time over that of the baseline in the same round; tokens per pass; repeats;
        parameters; active_parameters, those that a token meets on average: all but the routed
        experts that it does not use or uses with weight 0 (the input embedding counts in full; NaN
        where experts are quantised or offloaded); weight_bytes, parameters and buffers that are
        resident (offloaded ones are not); process_bytes, resident memory of the whole process
        after the last pass; accelerator_bytes, the highest that was allocated on the device of the
        model during that pass, NaN on a CPU; device, dtype, threads, seed.

    Raises:
        ModelError: The model is an encoder-decoder.
        OptionError: An intervention is called "baseline", or is itself a context manager.
    """
    check_interventions(interventions)
    require_decoder_only(model)
    changes: Interventions = {BASELINE: nullcontext, **interventions}
    input_ids = _tokens(model, rows, length, seed)
    seconds, state = _rounds(model, input_ids, changes, _WARM_UP + repeats)
    about = {
        "tokens": input_ids.numel(),
        "repeats": repeats,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "seed": seed,
    }
    table = []
    for name in changes:
        times = seconds[name][_WARM_UP:]
        low, median, high = np.quantile(times, [0.25, 0.5, 0.75]) / input_ids.numel()
        columns = {
            "intervention": name,
            "seconds_per_token": median,
            "seconds_per_token_low": low,
            "seconds_per_token_high": high,
            "ratio": np.median(times / seconds[BASELINE][_WARM_UP:]),
        }
        table.append(columns | state[name] | about)
    return pd.DataFrame(table)


def _rounds(
    model: MoEModel, input_ids: Int64[Tensor, "rows length"], changes: Interventions, rounds: int
) -> tuple[dict[str, Float64[np.ndarray, " rounds"]], dict[str, dict[str, object]]]:
    """Seconds of each pass, and columns on parameters and memory, by intervention."""
    seconds = {name: np.empty(rounds) for name in changes}
    state: dict[str, dict[str, object]] = {}
    with evaluating(model):
        for number in track(range(rounds), "speed: rounds"):
            for name, intervention in changes.items():
                with intervention():
                    if not number:
                        state[name] = _parameters(model, input_ids)
                    seconds[name][number] = _seconds(model, input_ids)
                    state[name] |= _memory(model)
    return seconds, state


def _tokens(model: MoEModel, rows: int, length: int, seed: int) -> Int64[Tensor, "rows length"]:
    vocabulary = len(model.model.get_input_embeddings().get_parameter("weight"))
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (rows, length), generator=generator).to(model.device)


def _seconds(model: MoEModel, input_ids: Tensor) -> float:
    cuda = model.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(model.device)
        torch.cuda.synchronize()
    start = time.perf_counter()
    logits = model.forward(input_ids, head=True).logits
    if cuda:
        torch.cuda.synchronize(logits.device)
    return time.perf_counter() - start


def _memory(model: MoEModel) -> dict[str, object]:
    """Bytes after a pass."""
    tensors = [*model.model.parameters(), *model.model.buffers()]
    resident = {t.data_ptr(): t.numel() * t.element_size() for t in tensors if not t.is_meta}
    cuda = model.device.type == "cuda"
    return {
        "weight_bytes": sum(resident.values()),
        "process_bytes": psutil.Process().memory_info().rss,
        "accelerator_bytes": torch.cuda.max_memory_allocated(model.device) if cuda else np.nan,
    }


def _parameters(model: MoEModel, input_ids: Tensor) -> dict[str, object]:
    """Parameters in all, and those that a token meets, by the experts that this pass uses."""
    total = sum(parameter.numel() for parameter in model.model.parameters())
    idle = 0.0

    def count(seen: Observation) -> None:
        nonlocal idle
        sizes = _expert_sizes(seen.layer)
        used = seen.routing.experts[(seen.routing.experts >= 0) & (seen.routing.weights != 0)]
        idle += float(sizes.sum() - sizes[used.cpu()].sum() / len(seen.input))

    with observe(model.layers, count):
        model.forward(input_ids)
    return {"parameters": total, "active_parameters": total - idle}


def _expert_sizes(layer: MoELayer) -> Float64[Tensor, " experts"]:
    """Parameters of each routed expert; NaN where they cannot be counted."""
    try:
        sizes = [
            sum(tensor.numel() for tensor in layer.expert_tensors(expert).values())
            for expert in range(layer.num_experts)
        ]
    except ModelError:
        return torch.full((layer.num_experts,), torch.nan, dtype=torch.float64)
    return torch.tensor(sizes, dtype=torch.float64)
