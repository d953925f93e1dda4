"""Train `tiny`, a Qwen2-MoE language model of three million parameters, from scratch.

    python recipes/tiny/train.py --work DIR

Needs `documents.py` and `tokenizer.py` to have run. Writes `WORK/checkpoints/step-N/` (bf16
safetensors) five times along training and a log line every 100 steps. About an hour on 2 cores.
"""

import argparse
import math
import time
from pathlib import Path

import documents
import torch
from transformers import PreTrainedTokenizerFast, Qwen2MoeConfig, Qwen2MoeForCausalLM

SEED = 0
STEPS = 3_500
SAVED_STEPS = (150, 500, 1_200, 2_400, STEPS)
LENGTH = 256
WARMUP, PEAK_RATE, WEIGHT_DECAY = 150, 2e-3, 0.1
BALANCE = 0.01  # weight of the load-balancing loss
SHARES = {"encyclopedia": 4, "maths": 4, "code": 5, "french": 3}  # rows of a batch


def config(tokenizer: PreTrainedTokenizerFast) -> Qwen2MoeConfig:
    return Qwen2MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=96,
        shared_expert_intermediate_size=128,
        intermediate_size=384,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        output_router_logits=True,
    )


class Stream:
    """Endless rows of one domain: documents in a new random order every pass, packed."""

    def __init__(self, documents: list[list[int]], generator: torch.Generator) -> None:
        self.documents, self.generator = documents, generator
        self.buffer: list[int] = []

    def row(self) -> list[int]:
        while len(self.buffer) < LENGTH + 1:
            for i in torch.randperm(len(self.documents), generator=self.generator).tolist():
                self.buffer += self.documents[i]
        row, self.buffer = self.buffer[: LENGTH + 1], self.buffer[LENGTH:]
        return row


def streams(work: Path, tokenizer: PreTrainedTokenizerFast) -> dict[str, Stream]:
    generator = torch.Generator().manual_seed(SEED)
    found = {}
    for domain in SHARES:
        texts = [text for _, text in documents.read(work / "train" / f"{domain}.jsonl")]
        tokens = [[tokenizer.bos_token_id, *ids] for ids in tokenizer(texts)["input_ids"]]
        print(f"{domain}: {sum(map(len, tokens))} training tokens", flush=True)
        found[domain] = Stream(tokens, generator)
    return found


def balance_loss(router_logits: tuple[torch.Tensor, ...], top_k: int) -> torch.Tensor:
    """Switch Transformer's auxiliary loss (arXiv 2101.03961, eq. 4), mean over layers."""
    losses = []
    for logits in router_logits:  # [tokens, experts]
        probabilities = logits.float().softmax(-1)
        chosen = torch.zeros_like(probabilities).scatter_(1, logits.topk(top_k).indices, 1.0)
        losses.append(logits.shape[1] * (chosen.mean(0) / top_k * probabilities.mean(0)).sum())
    return torch.stack(losses).mean()


def rate(step: int) -> float:
    """Linear warm-up, then a cosine to a tenth of the peak."""
    if step < WARMUP:
        return PEAK_RATE * (step + 1) / WARMUP
    progress = (step - WARMUP) / (STEPS - WARMUP)
    return PEAK_RATE * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    work = parser.parse_args().work
    torch.manual_seed(SEED)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
    rows = streams(work, tokenizer)
    model = Qwen2MoeForCausalLM(config(tokenizer))
    print(f"{model.num_parameters()} parameters", flush=True)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0}],
        betas=(0.9, 0.95),
        fused=True,
    )
    model.train()
    started, running = time.monotonic(), 0.0
    for step in range(1, STEPS + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate(step - 1)
        batch = torch.tensor([rows[d].row() for d, n in SHARES.items() for _ in range(n)])
        output = model(input_ids=batch[:, :-1], use_cache=False)
        loss = torch.nn.functional.cross_entropy(
            output.logits.flatten(0, 1), batch[:, 1:].flatten()
        )
        balance = balance_loss(output.router_logits, model.config.num_experts_per_tok)
        (loss + BALANCE * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running += loss.item()
        if step % 100 == 0:
            seconds = time.monotonic() - started
            log = f"step {step} loss {running / 100:.4f} balance {balance:.3f} {seconds:.0f} s"
            print(log, flush=True)
            running = 0.0
        if step in SAVED_STEPS:
            save(model, tokenizer, work / "checkpoints" / f"step-{step}")


def save(model: Qwen2MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """bf16 weights and the tokenizer; the training copy keeps its precision."""
    half = Qwen2MoeForCausalLM(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.config.output_router_logits = False
    half.save_pretrained(folder)
    half.config.output_router_logits = True
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
