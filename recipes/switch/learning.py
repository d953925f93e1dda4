"""What pre-training and fine-tuning of `tiny-switch` share: the model, the steps, the losses."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import cos, pi
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersTop1Router,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "tiny"))
from train import BALANCE, WEIGHT_DECAY, balance_loss

SEED = 0
WARMUP = 200
ROUTER_Z = 1e-3  # weight of the squared log-partition of the router (arXiv 2202.08906, eq. 5)
EMBEDDINGS_FASTER = 5  # T5's embeddings have a standard deviation of 1, its matrices of 0.1
AVERAGED_STEPS = 500  # reach of the running average of the weights
POOL = 8  # batches are cut out of this many, sorted by length
LOG_EVERY, KEEP_EVERY = 100, 500

Batch = tuple[Tensor, Tensor]
"""Token ids of the encoder and of the answers, [rows, length] each, padded with 0."""
Switch = SwitchTransformersForConditionalGeneration


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long and how fast one part of training goes."""

    name: str
    """Of the folder in WORK that keeps its state."""
    steps: int
    """Optimiser steps."""
    peak_rate: float
    """Highest learning rate of all but the embeddings."""
    smoothing: float = 0.0
    """Label smoothing."""
    dropout: float = 0.0
    """Of everything that the class drops."""


def config(tokenizer: PreTrainedTokenizerFast) -> SwitchTransformersConfig:
    return SwitchTransformersConfig(
        vocab_size=len(tokenizer),
        d_model=96,
        d_kv=24,
        num_heads=4,
        d_ff=160,
        num_layers=6,
        num_sparse_encoder_layers=6,
        num_decoder_layers=3,
        num_sparse_decoder_layers=3,
        num_experts=8,
        expert_capacity=4_096,  # no token is ever dropped
        router_jitter_noise=0.0,  # transformers multiplies the experts' input by it, too
        dropout_rate=0.0,  # fine-tuning sets its own
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> Switch:
    """Random weights; transformers' own start of the routers, 10 times this, picks once for all."""
    torch.manual_seed(SEED)
    model = Switch(config(tokenizer))
    for router in routers(model):
        torch.nn.init.normal_(router.classifier.weight, std=model.config.d_model**-0.5)
    return model


def routers(model: Switch) -> list[SwitchTransformersTop1Router]:
    """Encoder first, then decoder, as they run."""
    return [m for m in model.modules() if isinstance(m, SwitchTransformersTop1Router)]


def padded(rows: list[list[int]]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


def alike(lengths: list[int], rows: int, generator: torch.Generator) -> list[int]:
    """Rows drawn at random that are of about the same length: little padding to compute."""
    drawn = torch.randint(len(lengths), (POOL * rows,), generator=generator).tolist()
    drawn.sort(key=lambda i: lengths[i])
    start = rows * int(torch.randint(POOL, (1,), generator=generator))
    return drawn[start : start + rows]


def logits_of(model: Switch, batch: Batch) -> Tensor:
    """[rows, answer length, vocabulary]: with the answer so far as the decoder's input."""
    asked, answers = batch
    start = torch.full_like(answers[:, :1], model.config.decoder_start_token_id)
    return model(
        input_ids=asked,
        attention_mask=(asked != 0).long(),
        decoder_input_ids=torch.cat([start, answers[:, :-1]], dim=1),
        use_cache=False,
    ).logits


def losses(model: Switch, batch: Batch, smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
    """That of the answers' tokens, of unbalanced experts, and of large router logits."""
    seen: list[Tensor] = []
    hooks = [r.register_forward_hook(lambda m, i, o: seen.append(o[2])) for r in routers(model)]
    logits = logits_of(model, batch)
    for hook in hooks:
        hook.remove()
    asked, answers = batch
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), answers.flatten(), ignore_index=0, label_smoothing=smoothing
    )
    layers = model.config.num_sparse_encoder_layers
    # The decoder's inputs are one position behind: its first is the start, its end is not read.
    kept = [(asked if i < layers else answers) != 0 for i in range(len(seen))]
    routed = tuple(x[mask] for x, mask in zip(seen, kept, strict=True))
    z = torch.stack([x.logsumexp(-1).square().mean() for x in routed]).mean()
    return loss, balance_loss(routed, 1), z


def optimizer_of(model: Switch) -> torch.optim.Optimizer:
    embeddings = [model.shared.weight]
    decayed = [p for p in model.parameters() if p.ndim >= 2 and p is not model.shared.weight]
    others = [p for p in model.parameters() if p.ndim < 2]
    return torch.optim.AdamW(
        [
            {"params": embeddings, "weight_decay": 0, "faster": EMBEDDINGS_FASTER},
            {"params": decayed, "weight_decay": WEIGHT_DECAY, "faster": 1},
            {"params": others, "weight_decay": 0, "faster": 1},
        ],
        betas=(0.9, 0.98),
        fused=True,
    )


def rate(plan: Plan, step: int) -> float:
    """Linear warm-up, then a cosine to a hundredth of the peak."""
    if step < WARMUP:
        return plan.peak_rate * (step + 1) / WARMUP
    progress = (step - WARMUP) / (plan.steps - WARMUP)
    return plan.peak_rate * (0.01 + 0.495 * (1 + cos(pi * progress)))


def train(
    plan: Plan,
    model: Switch,
    work: Path,
    batch_of: Callable[[int], Batch],
    measured: Callable[[Switch], str],
) -> Switch:
    """Train, and return the averaged weights. Continues from the last state that was kept.

    Args:
        plan: How long and how fast.
        model: Changed in place.
        work: Folder that keeps the state, in a folder with the plan's name.
        batch_of: The batch of a step; the same for the same step.
        measured: What the averaged weights do, for the log.
    """
    average = Switch(model.config).eval()
    average.load_state_dict(model.state_dict())
    optimizer, state, done = optimizer_of(model), work / plan.name / "state.pt", 0
    state.parent.mkdir(parents=True, exist_ok=True)
    if state.exists():
        kept = torch.load(state, weights_only=True)
        model.load_state_dict(kept["model"])
        average.load_state_dict(kept["average"])
        optimizer.load_state_dict(kept["optimizer"])
        done = kept["step"]
    print(f"{plan.name}: {model.num_parameters()} parameters, from step {done}", flush=True)
    ours, averaged = list(model.parameters()), list(average.parameters())
    started, running = time.monotonic(), []
    for step in range(done + 1, plan.steps + 1):
        torch.manual_seed(SEED + step)  # what is dropped depends on the step alone
        for group in optimizer.param_groups:
            group["lr"] = rate(plan, step - 1) * group["faster"]
        loss, balance, z = losses(model.train(), batch_of(step), plan.smoothing)
        (loss + BALANCE * balance + ROUTER_Z * z).backward()
        torch.nn.utils.clip_grad_norm_(ours, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(averaged, ours, max(1 / step, 1 / AVERAGED_STEPS))
        running.append(loss.item())
        if step % LOG_EVERY == 0:
            mean, seconds = sum(running) / len(running), time.monotonic() - started
            log = f"step {step} loss {mean:.4f} balance {balance:.3f} z {z:.2f} {seconds:.0f} s"
            print(log, flush=True)
            running = []
        if step % KEEP_EVERY == 0 or step == plan.steps:
            kept = {"model": model.state_dict(), "average": average.state_dict()}
            kept |= {"optimizer": optimizer.state_dict(), "step": step}
            torch.save(kept, state.with_suffix(".new"))
            state.with_suffix(".new").replace(state)
            print(f"step {step} averaged: {measured(average)}", flush=True)
    return average
