"""What a sweep over experts per token costs, beside the published procedure written out plainly.

    python benchmarks/topk.py [--model tiny] [--experts-per-token 6] [--rounds 3] [--documents 40]

The published procedure goes over the text once for every k: it sets the number in the model's own
routers, tokenises every document again and runs it alone. The sweep of `topk` tokenises once and
runs every batch through the model as it is and through every setting. Both read the same documents
with the same settings, k = 1..K with weights as they are, in interleaved rounds; what is compared
is elapsed time, and processor time, which a busy machine disturbs less.

The second table has the most memory above that of the loaded model in a sweep over the first n of
all settings: it should not grow with n. It is taken in float32: for bfloat16 on a processor torch's
matrix library keeps kernels for every shape that it meets, which are not the sweep's. `--memory`
takes it alone, undisturbed by what came before.
"""

import argparse
import ctypes
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

import moescope
from moescope.analyses.topk.options import Setting, TopkOptions, settings_of
from moescope.analyses.topk.sweep import sweep
from moescope.corpora.packing import Packing
from moescope.corpora.sources import BUILTIN_DOMAINS, parse
from moescope.models.view import MoEModel

_MMAP_THRESHOLD = -3  # as malloc.h has it
WORDS = 120
"""Of each document, so that it fits a row."""


def texts(count: int) -> list[str]:
    """The beginnings of built-in documents, the same number of each domain."""
    found = []
    for domain in BUILTIN_DOMAINS:
        documents = parse(f"builtin:{domain}").documents()
        for document, _ in zip(documents, range(count // len(BUILTIN_DOMAINS)), strict=False):
            found.append(" ".join(str(document.content).split()[:WORDS]))
    return found


def _use(model: MoEModel, k: int) -> None:
    for layer in model.layers:
        layer.router.top_k = k


@torch.no_grad()
def published(model: MoEModel, lines: list[str], ks: list[int]) -> None:
    """Perplexity of every document, one pass over the text per k."""
    assert model.tokenizer is not None
    for k in ks:
        _use(model, k)
        for line in lines:
            ids = model.tokenizer(line, return_tensors="pt").input_ids.to(model.device)
            logits = model.model(ids).logits[0, :-1]
            cross_entropy(logits.float(), ids[0, 1:]).exp().item()


def seconds(run: Callable[[], object]) -> tuple[float, float]:
    """Elapsed and processor time of a call."""
    start, start_processor = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - start, time.process_time() - start_processor


def peak_bytes(model: MoEModel, run: Callable[[], object]) -> int:
    """Most memory during a call, above what there was before."""
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 1 << 16)  # what is freed is given back at once
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # Linux forgets the peak so far
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--experts-per-token", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--documents", type=int, default=40)
    parser.add_argument("--memory", action="store_true", help="only the second table")
    parser.add_argument("--device-map", default=None)
    options = parser.parse_args()
    model = moescope.load(options.model, device_map=options.device_map)
    _use(model, options.experts_per_token)
    lines = texts(options.documents)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lines.txt"
        path.write_text("\n".join(lines), encoding="utf-8")
        packings = {
            "sweep, a document per row": Packing(packed=False, shuffle=0),
            "sweep, packed rows": Packing(shuffle=0),
        }
        corpora = {
            name: moescope.Corpus.from_sources({"text": f"{path}:lines"}, packing)
            for name, packing in packings.items()
        }
        print(f"{model}, {options.experts_per_token} experts per token, {len(lines)} documents")
        if not options.memory:
            _times(model, lines, corpora, options.rounds)
        model = moescope.load(options.model, dtype="float32", device_map=options.device_map)
        _use(model, options.experts_per_token)
        _memory(model, corpora["sweep, packed rows"])


def _times(
    model: MoEModel, lines: list[str], corpora: dict[str, moescope.Corpus], rounds: int
) -> None:
    most = model.layers[0].top_k
    ks = list(range(1, most + 1))
    settings = [Setting(None, "as_is", k) for k in ks]
    runs: dict[str, Callable[[], object]] = {
        "published procedure": lambda: published(model, lines, ks)
    }
    for name, corpus in corpora.items():
        runs[name] = lambda corpus=corpus: sweep(model, corpus, settings)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            times[name].append(seconds(run))
    print(f"\n{'':28}{'median s':>10}{'ratio':>8}{'processor s':>13}{'ratio':>8}")
    medians = {
        name: [statistics.median(pair[i] for pair in pairs[1:]) for i in (0, 1)]
        for name, pairs in times.items()
    }
    first = medians["published procedure"]
    for name, (elapsed, processor) in medians.items():
        ratios = elapsed / first[0], processor / first[1]
        print(f"{name:28}{elapsed:10.2f}{ratios[0]:8.2f}{processor:13.2f}{ratios[1]:8.2f}")


def _memory(model: MoEModel, corpus: moescope.Corpus) -> None:
    settings = settings_of(model, TopkOptions())
    sweep(model, corpus, settings[:2])
    print(f"\n{'settings':>8}{'peak MiB':>10}")
    for count in (1, 4, 16):
        peak = peak_bytes(model, lambda count=count: sweep(model, corpus, settings[:count]))
        print(f"{count:8}{peak / 2**20:10.1f}")


if __name__ == "__main__":
    main()
