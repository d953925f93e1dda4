"""How much memory it takes to capture a model that is larger than that memory.

    python benchmarks/capture_memory.py [--mebibytes 2048] [--limit 1000] [--above-start]

Builds a random model of that size in one process, then loads it with all weights on disk
(`device_map={"": "disk"}`), proves its conformance, and captures a text with it in another. Counted
is anonymous resident memory (RssAnon of /proc/self/status, so Linux only), every 5 ms: what the
process needs and cannot get back from a file. Pages of files that are mapped are not; the system
takes them away when memory is short. The limit is on the peak, or on its rise since the libraries
were loaded.
"""

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moescope
from moescope.corpora.packing import Packing

LAYERS, EXPERTS, VOCABULARY = 16, 32, 512
ROWS, LENGTH = 4, 128  # 512 tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mebibytes", type=int, default=2048, help="of weights, in float32")
    parser.add_argument("--limit", type=float, default=1000, help="largest peak, in MB")
    parser.add_argument("--above-start", action="store_true", help="limit the rise, not the peak")
    parser.add_argument("--step", choices=["build", "capture"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step == "build":
        build(options.folder / "model", options.mebibytes)
    elif options.step == "capture":
        start, peak = capture(options.folder)
        peak -= start if options.above_start else 0
        sys.exit(f"{peak:.0f} MB is above the limit" if peak > options.limit else 0)
    else:
        with tempfile.TemporaryDirectory() as folder:
            for step in ("build", "capture"):
                subprocess.run(
                    [sys.executable, *sys.argv, "--step", step, "--folder", folder], check=True
                )


def build(folder: Path, mebibytes: int) -> None:
    """Save a random model of about that size, nearly all of it experts."""
    hidden = 64 * round((mebibytes * 2**20 / 4 / (LAYERS * EXPERTS * 3 / 2)) ** 0.5 / 64)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden,
        moe_intermediate_size=hidden // 2,
        num_hidden_layers=LAYERS,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).save_pretrained(folder, max_shard_size="256MB")


def capture(folder: Path) -> tuple[float, float]:
    """Load and capture; print and return anonymous memory at the start and at its peak, in MB."""
    with Watch() as watch:
        start = watch.peak
        began = time.perf_counter()
        model = moescope.load(folder / "model", device_map={"": "disk"}, offload_folder=folder)
        loaded, after_load = watch.peak, time.perf_counter()
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator).tolist()
        corpus = moescope.Corpus.from_token_ids({"random": rows}, Packing(length=LENGTH, rows=1))
        record = ("routing", "inputs", "residual", "token_loss")
        moescope.capture(model, corpus, folder / "run", record=record, tokens_per_expert=64)
        done = time.perf_counter()
    weights = sum(tensor.nbytes for tensor in model.model.parameters())
    print(f"weights, in {LAYERS} layers of {EXPERTS} experts    {weights / 1e6:8,.0f} MB")
    print(f"anonymous memory with libraries      {start:8,.0f} MB")
    print(f"peak after loading and conformance   {loaded:8,.0f} MB, {after_load - began:.0f} s")
    print(f"peak after capturing {ROWS * LENGTH:,} tokens    {watch.peak:8,.0f} MB, ", end="")
    print(f"{done - after_load:.0f} s")
    return start, watch.peak


class Watch:
    """Notes the largest anonymous memory of this process, from a thread of its own."""

    def __enter__(self) -> "Watch":
        self.peak = anonymous_mb()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.005):
            self.peak = max(self.peak, anonymous_mb())


def anonymous_mb() -> float:
    """RssAnon now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024 / 1e6


if __name__ == "__main__":
    main()
