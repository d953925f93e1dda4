"""Train the relatives of `tiny`: a second size, a dense model, and what becomes of it.

    python recipes/relatives/training.py NAME --work DIR

`NAME` is one of `MODELS`; `upcycled`, `split` and `continued` start from `dense`. Needs the
documents and the tokenizer of `tiny` in DIR. Writes `DIR/NAME/step-N/` (bf16 safetensors) along
training and a log line every 50 steps. Stopped and started again, it continues from the last
step that was saved.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from moescope.surgery.conversion import SplitOptions, UpcycleOptions, split, upcycle

sys.path.insert(0, str(Path(__file__).parents[1] / "tiny"))
from train import BALANCE, WEIGHT_DECAY, Stream, balance_loss, streams

SEED = 0
ROWS = 2  # of each domain in a batch
STEPS_DENSE, STEPS_CONTINUED = 1_200, 600
WARMUP = 50
LOG_EVERY, STATE_EVERY = 50, 100

SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "intermediate_size": 128,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How one model comes to be."""

    start: Callable[[dict[str, int], Path], PreTrainedModel]
    """Makes the model from the tokenizer's numbers and the working folder."""
    steps: int
    """Optimiser steps, each of `ROWS` rows of 256 tokens per domain."""
    saved: tuple[int, ...]
    """Steps to keep besides the last."""
    skipped: int = 0
    """Steps of the same stream of text that the ancestor has seen."""
    peak_rate: float = 5e-3
    """Highest learning rate."""


def small(tokens: dict[str, int], work: Path) -> PreTrainedModel:
    """The second size, and the shape of `upcycled`, from random weights."""
    config = Qwen3MoeConfig(
        **SHAPE,
        **tokens,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=SHAPE["intermediate_size"],
        norm_topk_prob=True,
    )
    return Qwen3MoeForCausalLM(config)


def dense(tokens: dict[str, int], work: Path) -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**SHAPE, **tokens))


def ancestor(work: Path) -> PreTrainedModel:
    """`dense` in full precision."""
    folder = work / "dense" / f"step-{STEPS_DENSE}"
    return Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)


MODELS = {
    "dense": Plan(start=dense, steps=STEPS_DENSE, saved=(400,)),
    "small": Plan(start=small, steps=STEPS_DENSE + STEPS_CONTINUED, saved=(0, 100, 400, 1_000)),
    "upcycled": Plan(
        start=lambda tokens, work: (
            upcycle(ancestor(work), UpcycleOptions(experts=8, top_k=2)).model.model
        ),
        steps=STEPS_CONTINUED,
        saved=(0, 50, 200),
        skipped=STEPS_DENSE,
        peak_rate=2.5e-3,
    ),
    "split": Plan(
        start=lambda tokens, work: (
            split(ancestor(work), SplitOptions(experts=8, top_k=2)).model.model
        ),
        steps=STEPS_CONTINUED,
        saved=(0, 50, 200),
        skipped=STEPS_DENSE,
        peak_rate=2.5e-3,
    ),
    "continued": Plan(
        start=lambda tokens, work: ancestor(work),
        steps=STEPS_CONTINUED,
        saved=(),
        skipped=STEPS_DENSE,
        peak_rate=2.5e-3,
    ),
}


def batches(rows: dict[str, Stream]) -> Iterator[torch.Tensor]:
    while True:
        yield torch.tensor([stream.row() for stream in rows.values() for _ in range(ROWS)])


def rate(plan: Plan, step: int) -> float:
    """Linear warm-up, then a cosine to a tenth of the peak."""
    if step < WARMUP:
        return plan.peak_rate * (step + 1) / WARMUP
    progress = (step - WARMUP) / (plan.steps - WARMUP)
    return plan.peak_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def optimizer_of(model: PreTrainedModel) -> torch.optim.Optimizer:
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0}],
        betas=(0.9, 0.95),
        fused=True,
    )


def losses(model: PreTrainedModel, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """That of the next token in nats, and that of unbalanced experts (0 for a dense model)."""
    sparse = isinstance(model, Qwen3MoeForCausalLM)
    options = {"output_router_logits": True} if sparse else {}
    output = model(input_ids=batch[:, :-1], use_cache=False, **options)
    loss = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), batch[:, 1:].flatten())
    if not sparse:
        return loss, torch.zeros(())
    return loss, balance_loss(output.router_logits, model.config.num_experts_per_tok)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """bf16 weights and the tokenizer; the training copy keeps its precision."""
    half = type(model)(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def numbers_of(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def keep_state(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, step: int, path: Path
) -> None:
    """All that training needs to go on, written whole or not at all."""
    kept = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    torch.save(kept, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def train(name: str, work: Path) -> None:
    plan, folder = MODELS[name], work / name
    torch.manual_seed(SEED)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
    model = plan.start(numbers_of(tokenizer), work).train()
    optimizer = optimizer_of(model)
    done, state = 0, folder / "state.pt"
    if state.exists():
        kept = torch.load(state, weights_only=True)
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        done = kept["step"]
    elif 0 in plan.saved:
        save(model, tokenizer, folder / "step-0")
    print(f"{name}: {model.num_parameters()} parameters, from step {done}", flush=True)
    text = batches(streams(work, tokenizer))
    for _ in range(plan.skipped + done):
        next(text)
    started, running = time.monotonic(), []
    for step in range(done + 1, plan.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate(plan, step - 1)
        loss, balance = losses(model, next(text))
        (loss + BALANCE * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running.append(loss.item())
        if step % LOG_EVERY == 0:
            mean, seconds = sum(running) / len(running), time.monotonic() - started
            log = f"step {step} loss {mean:.4f} balance {balance:.3f} {seconds:.0f} s"
            print(log, flush=True)
            running = []
        if step in (*plan.saved, plan.steps):
            save(model, tokenizer, folder / f"step-{step}")
        if step % STATE_EVERY == 0:
            keep_state(model, optimizer, step, state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=sorted(MODELS))
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_args()
    (options.work / options.name).mkdir(parents=True, exist_ok=True)
    train(options.name, options.work)


if __name__ == "__main__":
    main()
