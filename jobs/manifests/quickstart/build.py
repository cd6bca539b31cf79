"""Makes the quickstart's corpus and its small causal transformer, from nothing but Python's standard library.

    python jobs/manifests/quickstart/build.py            # about 20 minutes on one core

Writes, beside this file: `corpus/*.jsonl.zst` (a document is one source file), `neox-stdlib/` (GPT-NeoX in
safetensors with its byte-level BPE tokenizer) and `neox-stdlib/PROVENANCE.json`. The files are committed, so
nobody needs to run this; it is here so that anybody can see where the weights come from.

The model never sees the held-out split: it is drawn by the same hash of the document as the pipeline's.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import shutil
import sysconfig
import time
from pathlib import Path

import torch
import zstandard
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from pipeline.sources.corpus import document_id, is_heldout

HERE = Path(__file__).parent
HELDOUT = 0.1
CONTEXT = 256
VOCABULARY = 2048
END = "<|endoftext|>"
SKIP = {"test", "tests", "idlelib", "lib2to3", "site-packages", "__pycache__", "turtledemo", "ensurepip"}


def corpus() -> list[tuple[str, str]]:
    """(path, text) of the standard library's own sources, sorted by path; tests and vendored code left out."""
    library = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if SKIP.isdisjoint(relative.parts) and "config-" not in str(relative):
            try:
                text = path.read_text("utf-8")
            except UnicodeDecodeError:
                continue
            if text.strip() and not path.name.startswith("_sysconfigdata"):
                found.append((relative.as_posix(), text))
    return found


def write_corpus(documents: list[tuple[str, str]], parts: int = 8) -> None:
    """The documents, dealt out over `parts` compressed JSONL files."""
    folder = HERE / "corpus"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for part in range(parts):
        lines = "".join(json.dumps({"path": path, "text": text}) + "\n" for path, text in documents[part::parts])
        packed = zstandard.ZstdCompressor(level=19).compress(lines.encode())
        (folder / f"stdlib-{part:02d}.jsonl.zst").write_bytes(packed)
    shutil.copy(Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt", folder / "LICENSE-PSF.txt")


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on the training split."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, model_max_length=CONTEXT)


def windows(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Every document as BOS + tokens, cut into windows of `CONTEXT`; tails shorter than that are left out."""
    rows = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        step = CONTEXT - 1
        rows += [[tokenizer.bos_token_id, *ids[at : at + step]] for at in range(0, len(ids) - step + 1, step)]
    return torch.tensor(rows)


@torch.no_grad()
def validation_loss(model: GPTNeoXForCausalLM, held: torch.Tensor) -> float:
    """Mean nats per token."""
    model.eval()
    losses = [model(input_ids=batch, labels=batch).loss.item() for batch in held.split(16) if len(batch) == 16]
    model.train()
    return sum(losses) / len(losses)


def train(train_rows: torch.Tensor, held: torch.Tensor, epochs: float, seed: int) -> tuple[GPTNeoXForCausalLM, dict]:
    """Muon for matrices, AdamW for the rest; warm-up, then a linear decay to zero."""
    torch.manual_seed(seed)
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        rotary_pct=0.25,
        use_parallel_residual=False,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )
    model = GPTNeoXForCausalLM(config)
    inner = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    inner_ids = {id(p) for p in inner}
    outer = [p for p in model.parameters() if id(p) not in inner_ids]
    optimizers = [
        torch.optim.Muon(inner, lr=0.02, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(outer, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    batch, steps = 8, int(epochs * len(train_rows) / 8)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            o, lambda step: min((step + 1) / 100, max(0.0, 1.0 - step / steps) / 0.7, 1.0)
        )
        for o in optimizers
    ]
    order = torch.cat([torch.randperm(len(train_rows)) for _ in range(math.ceil(epochs))])
    start = time.process_time()
    for step in range(steps):
        rows = train_rows[order[step * batch : (step + 1) * batch]]
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if step % 200 == 0 or step == steps - 1:
            cpu = time.process_time() - start
            print(f"step {step}/{steps} loss {loss.item():.3f} cpu {cpu:.0f}s", flush=True)
    final = validation_loss(model, held)
    return model, {"steps": steps, "tokens": steps * batch * CONTEXT, "heldout_nats_per_token": round(final, 4)}


def main() -> None:
    """Build corpus, tokenizer and model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    documents = corpus()
    write_corpus(documents)
    split = [is_heldout(document_id(text), HELDOUT) for _, text in documents]
    training = [text for (_, text), held in zip(documents, split, strict=True) if not held]
    heldout = [text for (_, text), held in zip(documents, split, strict=True) if held]
    tokenizer = make_tokenizer(training)
    train_rows, held_rows = windows(tokenizer, training), windows(tokenizer, heldout)
    print(f"{len(training)} + {len(heldout)} documents, {train_rows.numel()} + {held_rows.numel()} tokens", flush=True)

    model, result = train(train_rows, held_rows, arguments.epochs, arguments.seed)
    folder = HERE / "neox-stdlib"
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    provenance = {
        "made_by": "jobs/manifests/quickstart/build.py",
        "text": f"the standard library of CPython {platform.python_version()}, PSF licence, {len(documents)} files",
        "heldout_fraction_by_document_hash": HELDOUT,
        "seed": arguments.seed,
        "torch": torch.__version__,
        "model_safetensors_sha256": weights,
        **result,
        "heldout_perplexity": round(math.exp(result["heldout_nats_per_token"]), 2),
    }
    (folder / "PROVENANCE.json").write_text(json.dumps(provenance, indent=2) + "\n")
    print(json.dumps(provenance, indent=2))


if __name__ == "__main__":
    main()
