"""What recording costs on top of a plain forward pass of the same model and the same batches.

    python benchmarks/capture_overhead.py [--model tiny] [--repeats 7] [--max-tokens 60000]

The runs are interleaved and their medians compared. A capture is the whole call of
`moescope.capture` into an empty folder: packing, forward passes, writing, flushing to disk,
checksums, opening. A plain pass is nothing but `model(input_ids, attention_mask)` for batches that
are ready. `capture` needs logits only for `token_loss`; without it, it runs the model without its
head, so it is compared with a plain pass without the head. Ratios against the pass with the head,
which computes logits, are printed beside.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import moescope
from moescope.corpora.packing import Batch, Packing
from moescope.models.view import MoEModel

RECORDS = {
    "routing": ("routing",),
    "routing + inputs": ("routing", "inputs"),
    "routing + inputs + residual": ("routing", "inputs", "residual"),
    "routing + token_loss": ("routing", "token_loss"),
}
LIMITS = {"routing": 1.15, "routing + inputs": 1.35}


def plain(model: MoEModel, batches: list[Batch], *, head: bool) -> None:
    network = model.model if head else model.model.base_model
    with torch.inference_mode():
        for batch in batches:
            input_ids = batch.input_ids.to(model.device)
            mask = batch.attention_mask.to(model.device)
            network(input_ids=input_ids, attention_mask=mask, use_cache=False)


def as_token_ids(model: MoEModel, packing: Packing) -> moescope.Corpus:
    """The built-in corpus, tokenised beforehand."""
    documents: dict[str, dict[int, list[int]]] = {}
    corpus = moescope.Corpus.builtin(packing)
    for batch in corpus.batches(model.tokenizer):
        for ids, numbers, domains in zip(
            batch.input_ids, batch.documents, batch.domains, strict=True
        ):
            found = documents.setdefault(corpus.domains[int(domains[0])], {})
            for token, number in zip(ids.tolist(), numbers.tolist(), strict=True):
                if number >= 0:
                    found.setdefault(number, []).append(token)
    given = {domain: list(found.values()) for domain, found in documents.items()}
    return moescope.Corpus.from_token_ids(given, packing)


def seconds(run: Callable[[], object]) -> tuple[float, float]:
    """Elapsed and processor time of a call."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start, start_processor = time.perf_counter(), time.process_time()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, time.process_time() - start_processor


def runs(
    model: MoEModel, corpus: moescope.Corpus, folder: Path, repeats: int
) -> dict[str, list[tuple[float, float]]]:
    batches = list(corpus.batches(model.tokenizer))
    plain(model, batches[:2], head=True)
    kinds: dict[str, Callable[[str], object]] = {
        "plain": lambda _: plain(model, batches, head=False),
        "plain, with head": lambda _: plain(model, batches, head=True),
    }
    for name, record in RECORDS.items():
        kinds[name] = lambda out, record=record: moescope.capture(
            model, corpus, folder / out, record=record
        )
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
    for repeat in range(repeats):
        for name, run in kinds.items():
            out = f"{name}-{repeat}"
            times[name].append(seconds(lambda run=run, out=out: run(out)))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--max-tokens", type=int, default=60_000)
    parser.add_argument("--rows", type=int, default=8, help="rows per batch")
    parser.add_argument("--device-map", default=None)
    options = parser.parse_args()
    model = moescope.load(options.model, device_map=options.device_map)
    corpus = as_token_ids(model, Packing(max_tokens=options.max_tokens, rows=options.rows))
    with tempfile.TemporaryDirectory() as folder:
        times = runs(model, corpus, Path(folder), options.repeats)
    elapsed, processor = (
        {name: statistics.median(pair[which] for pair in pairs) for name, pairs in times.items()}
        for which in (0, 1)
    )
    print(f"{model}\n{options.max_tokens} tokens, {options.rows} rows of 256 per batch")
    print(
        f"{torch.get_num_threads()} threads of {os.cpu_count()} CPUs, {options.repeats} repeats\n"
    )
    print(f"{'':30}{'median s':>10}{'of plain':>10}{'processor':>11}{'with head':>11}{'limit':>8}")
    failed = False
    for name, median in elapsed.items():
        ratio, beside = median / elapsed["plain"], median / elapsed["plain, with head"]
        busy = processor[name] / processor["plain"]
        limit = LIMITS.get(name)
        failed |= limit is not None and ratio > limit
        print(f"{name:30}{median:10.2f}{ratio:10.2f}{busy:11.2f}{beside:11.2f}{limit or '':>8}")
    sys.exit("an overhead is above its limit" if failed else 0)


if __name__ == "__main__":
    main()
