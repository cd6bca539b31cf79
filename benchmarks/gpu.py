"""The trainer on one GPU: how much of the card a step and its encoder use, beside the peers' on the same card.

    python benchmarks/gpu.py [--quick] [--case NAME ...] [--only NAME ...] [--tiles] [--json FILE]

First the kernels are compared with torch's on the card, at the width and number of features of each case; a difference
ends the run. Then contenders take turns as in `train.py`, all in bfloat16 (`kilobasis`: rows and their
first moments; peers: their autocast), each through its own trainer.

In cases of 1024 D our tree (see `overcomplete.py`) steps beside our dense dictionary of 16 D, with the same batch.

`kilobasis-encoder` is the search for the k largest alone, `encoder-gemm` torch's product alone, x W_enc^T in bfloat16,
whose scores are thrown away. Peak is the card's dense bfloat16 FLOP/s, MFU the useful FLOP of a step (see
`pipeline/dictionary/pace.py`) by peak, HBM the bytes that a step cannot do without by what memory could move meanwhile.

Without a GPU there is nothing to measure: a line says so. With --quick the kernels are interpreted on the CPU there, on
a tiny case, and compared all the same.

Exit code 1 where a mark is missed, Kilobasis fails, or kernels differ.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import marks
import torch
from contenders import OURS, REFERENCE, Contender, missing
from marks import Fact, Mark, fact, spread
from race import Case, Outcome, race, settings
from rich.console import Console
from rich.table import Table
from train import Outcomes, finished, middle, times

from pipeline.dictionary.kernels import portable
from pipeline.dictionary.model import DictionaryConfig, TreeShape
from pipeline.dictionary.pace import flops_per_token, peak_of

ENCODER, FLOOR = "kilobasis-encoder", "encoder-gemm"
OURSELVES = (REFERENCE, ENCODER, FLOOR)
CONTENDERS = (
    Contender(REFERENCE, "kilobasis_step.py", "bfloat16", OURS),
    Contender(ENCODER, "kilobasis_step.py", "encoder", OURS),
    Contender(FLOOR, "encoder_gemm.py", "", OURS),
    Contender("saelens", "saelens_step.py", "dense"),
    Contender("saelens-sparse", "saelens_step.py", "sparse"),
    Contender("sparsify", "sparsify_step.py", "signum"),
    Contender("sparsify-adam", "sparsify_step.py", "adam"),
)
CASES = (
    Case(768, 32, 64, 16384, threads=8, warmup=20, rounds=5, steps=20, batches=8, device="cuda"),
    Case(768, 128, 64, 16384, threads=8, warmup=5, rounds=5, steps=10, batches=4, device="cuda"),
    Case(4096, 32, 64, 8192, threads=8, warmup=3, rounds=3, steps=5, batches=4, device="cuda"),
    Case(768, 1024, 32, 65536, threads=8, warmup=5, rounds=5, steps=20, batches=2, device="cuda"),
    Case(4096, 1024, 32, 16384, threads=8, warmup=5, rounds=5, steps=10, batches=2, device="cuda"),
)
# Those of a tree, of which the reference is a dense dictionary of BASE D.
TREE, BASE, SIZE = "kilobasis-tree", 16, 1024
TREES = (
    Contender(REFERENCE, "kilobasis_step.py", "bfloat16", OURS),
    Contender(TREE, "kilobasis_step.py", f"tree-{SIZE // BASE - 1}-bfloat16", OURS),
)
QUICK = (Case(256, 16, 32, 2048, threads=8, warmup=2, rounds=2, steps=3, alive="one", batches=2, device="cuda"),)
INTERPRETED = Case(64, 16, 8, 8, threads=2, warmup=0, rounds=1, steps=1)

# Bytes/s of memory, from the makers' data sheets; by a part of the name.
BANDWIDTHS = {
    "H100 PCIe": 2.0e12,
    "H100 NVL": 3.9e12,
    "H100": 3.35e12,
    "H200": 4.8e12,
    "A100-SXM4-80GB": 2.04e12,
    "A100": 1.56e12,
    "L40S": 0.86e12,
    "A10G": 0.6e12,
}
# The encoder by the card's peak, where there are enough features for it to matter; a step by the best peer's.
SHARE, SPEED = 0.6, 3.0
LARGE = 98_304
# Tokens/s of a tree, by D.
PACE = {768: 2.5e6, 4096: 0.25e6}
# Tokens whose features are compared.
COMPARED = 256


def bandwidth_of(name: str) -> float | None:
    """Bytes/s of a GPU's memory by its name; None where no data sheet is known.

    >>> bandwidth_of("NVIDIA H200"), bandwidth_of("Radeon")
    (4800000000000.0, None)
    """
    return next((bytes_ for part, bytes_ in BANDWIDTHS.items() if part in name), None)


def bytes_of(case: Case) -> float:
    """That a step has to read and write, were caches without end within a token or a feature, and useless between them.

    The encoder once; a decoder row for each entry of the code, and for its gradient the token and its error; the rows
    that fired, both ways, if all entries are of different features as long as there are some.
    """
    entries = case.batch * case.k
    encoder = 2 * case.features * case.width
    gathered = entries * case.width * (2 + 4 + 4)
    moved = min(case.features, entries) * 2 * case.width * (2 + 2)
    return float(encoder + gathered + moved + 3 * 4 * case.batch * case.width)


def own(case: Case, name: str) -> Case:
    """A case as a contender has it: the dense dictionary beside a tree is smaller."""
    return replace(case, expansion=BASE) if case.expansion == SIZE and name != TREE else case


def useful(case: Case, name: str) -> float:
    """FLOP of a contender's step that somebody has to do; of a product alone those of the product."""
    if name in (ENCODER, FLOOR):
        return 2.0 * case.batch * case.features * case.width
    parents = case.k // 2
    tree = TreeShape(children=SIZE // BASE - 1, coarse_k=parents, routed=parents) if name == TREE else None
    shape = DictionaryConfig(
        width=case.width,
        features=own(case, name).features,
        k=case.k,
        tree=tree,
        hook_point="",
        model="",
        model_digest="",
    )
    return float(case.batch * flops_per_token(shape))


def differs(case: Case, device: str) -> str | None:
    """What the kernels do otherwise than torch, in a line; None where it is nothing."""
    from pipeline.dictionary.kernels import cuda

    generator = torch.Generator().manual_seed(0)
    x_BD = torch.randn(min(COMPARED, case.batch), case.width, generator=generator).to(device)
    W_FD = torch.randn(case.features, case.width, generator=generator).bfloat16().to(device) / case.width**0.5
    b_F = 0.1 * torch.randn(case.features, generator=generator).to(device)
    found = [kind.top_k(x_BD, W_FD, b_F, case.k) for kind in (cuda, portable)]
    (z_BK, indices_BK), (expected_BK, expected_indices_BK) = found
    if not torch.allclose(z_BK, expected_BK, rtol=1e-4, atol=1e-5):
        return f"values are {float((z_BK - expected_BK).abs().max()):.1e} apart"
    # Scores that round to different sides may change places.
    moved = float((indices_BK != expected_indices_BK).double().mean())
    if moved > 1e-3:
        return f"{moved:.1%} of the features are others"
    made = [kind.errors(z_BK, indices_BK, W_FD, None, x_BD, 0.5) for kind in (cuda, portable)]
    groups = [kind.group(z_BK, indices_BK, case.features) for kind in (cuda, portable)]
    pairs = list(zip(*made, strict=True))
    pairs.append((cuda.sums(groups[0], z_BK, x_BD), portable.sums(groups[1], z_BK, x_BD)))
    if not all(torch.allclose(mine, theirs, rtol=1e-3, atol=1e-3) for mine, theirs in pairs):
        return "reconstructions or gradients are apart"
    again = cuda.top_k(x_BD, W_FD, b_F, case.k)
    return None if torch.equal(again[0], z_BK) and torch.equal(again[1], indices_BK) else "bits change between two runs"


# Tokens, features and width of a tile, tiles of tokens that share features, warps, stages, whether programs take turns.
TILES = (
    (128, 256, 64, 8, 8, 3, False),
    (128, 256, 64, 8, 8, 3, True),
    (128, 256, 64, 16, 8, 3, True),
    (128, 256, 64, 32, 8, 3, True),
    (128, 256, 64, 32, 8, 4, True),
    (64, 256, 64, 32, 4, 2, True),
)


def tiled(case: Case, card: str, console: Console) -> list[Fact]:
    """The time of a search for each way to cut its product. All find the same."""
    from pipeline.dictionary.kernels import cuda_search

    x_BD = torch.randn(case.batch, case.width, device="cuda")
    W_FD = torch.randn(case.features, case.width, device="cuda").bfloat16() / case.width**0.5
    b_F = torch.zeros(case.features, device="cuda")
    peak, found, expected = peak_of(card), list[Fact](), cuda_search.top_k(x_BD, W_FD, b_F, case.k)
    for shape in TILES:
        cuda_search.tile = lambda device, width, shape=shape: cuda_search.Tile(*shape)
        try:
            made = cuda_search.top_k(x_BD, W_FD, b_F, case.k)
            assert torch.equal(made[0], expected[0]), "a way to cut the product has changed what is found"
            seconds = []
            for _ in range(case.rounds):
                torch.cuda.synchronize()
                began = time.perf_counter()
                cuda_search.top_k(x_BD, W_FD, b_F, case.k)
                torch.cuda.synchronize()
                seconds.append(time.perf_counter() - began)
        except triton_errors() as error:
            console.print(f"{case.name} {shape}: {str(error)[:80]}")
            continue
        flops = 2.0 * case.batch * case.features * case.width
        share = f", {flops / middle(seconds) / peak:.1%} of the peak" if peak else ""
        console.print(f"{case.name} {shape}: {1e3 * middle(seconds):.2f} ms{share}")
        found.append(fact(f"gpu/{case.name}/tile/{'x'.join(map(str, shape))}", seconds, "s", settings(case)))
    return found


def triton_errors() -> tuple[type[Exception], ...]:
    """What a tile raises that a card has no room for."""
    from triton.runtime.errors import OutOfResources, PTXASError

    return OutOfResources, PTXASError


def share_of_peak(case: Case, outcome: Outcome, peak: float, flops: float) -> list[float]:
    """FLOP/s of every round by the card's peak."""
    return [flops / seconds / peak for seconds in outcome.seconds]


def judged(case: Case, outcomes: Outcomes, peak: float | None) -> list[Mark]:
    """The marks of a case. What could not be measured misses its mark, unless no peer was to be run."""
    alive, made = finished(outcomes), []
    product = 2.0 * case.batch * case.features * case.width
    if case.features >= LARGE and TREE not in outcomes:
        known = ENCODER in alive and peak is not None
        share = middle(share_of_peak(case, alive[ENCODER], peak or 1.0, product)) if known else None
        made.append(Mark(f"{case.name}: encoder, by the peak", share, "at least", SHARE))
    if TREE in outcomes:
        pace = case.batch / middle(alive[TREE].seconds) if TREE in alive else None
        made.append(Mark(f"{case.name}: tokens/s of the tree", pace, "at least", PACE[case.width]))
    elif any(name not in OURSELVES for name in outcomes):
        peers = [name for name in alive if name not in OURSELVES]
        best = min((middle(times(outcomes, name)) for name in peers), default=None) if REFERENCE in alive else None
        made.append(Mark(f"{case.name}: speed, by the best peer's", best, "at least", SPEED))
    return made


def table(case: Case, outcomes: Outcomes, card: str) -> Table:
    """What a person reads."""
    shown = Table(
        title=f"{case.name}: D {case.width}, F {case.features:,}, k {case.k}, B {case.batch}, {card}: median of "
        f"{case.rounds} rounds of {case.steps} steps",
        caption="times: its step over Kilobasis'; of peak: of a step's useful FLOP, or of the product alone",
    )
    for heading in ("trainer", "tokens/s", "times (range)", "of peak", "HBM", "MiB", "FVU"):
        shown.add_column(heading, justify="left" if heading == "trainer" else "right", no_wrap=True)
    peak, bandwidth = peak_of(card), bandwidth_of(card)
    alive = finished(outcomes)
    for name, outcome in outcomes.items():
        if name not in alive:
            shown.add_row(name, f"failed: {outcome.failure}")
            continue
        seconds = middle(outcome.seconds)
        flops = useful(case, name)
        shown.add_row(
            name,
            f"{case.batch / seconds:,.0f}",
            spread(times(outcomes, name)) if name != REFERENCE and REFERENCE in alive else "",
            f"{flops / seconds / peak:.1%}" if peak else "",
            f"{bytes_of(own(case, name)) / seconds / bandwidth:.1%}" if bandwidth and name == REFERENCE else "",
            f"{outcome.peak_rss / 2**20:,.0f}",
            "" if name in (ENCODER, FLOOR) else f"{outcome.ended:.3f}" + ("" if outcome.learns else " does not fall"),
        )
    return shown


def facts(case: Case, outcomes: Outcomes, card: str) -> list[Fact]:
    """What a program reads."""
    found, alive, peak, bandwidth = [], finished(outcomes), peak_of(card), bandwidth_of(card)
    for name, outcome in outcomes.items():
        config = settings(case) | {"contender": name, "card": card}
        prefix = f"gpu/{case.name}/{name}"
        if name not in alive:
            found.append(fact(f"{prefix}/failed", [1.0], "count", config | {"reason": outcome.failure}))
            continue
        pace = [case.batch / each for each in outcome.seconds]
        found.append(fact(f"{prefix}/tokens_per_s", pace, "tokens/s", config))
        found.append(fact(f"{prefix}/peak_memory", [outcome.peak_rss], "bytes", config))
        if peak is not None:
            shares = share_of_peak(case, outcome, peak, useful(case, name))
            found.append(fact(f"{prefix}/mfu", shares, "share of the card's peak", config))
        if bandwidth is not None and name == REFERENCE:
            shares = [bytes_of(own(case, name)) / each / bandwidth for each in outcome.seconds]
            found.append(fact(f"{prefix}/hbm", shares, "share of the card's bandwidth", config))
        if name != REFERENCE and REFERENCE in alive:
            found.append(fact(f"{prefix}/times", times(outcomes, name), "its step / kilobasis'", config))
    return found


def interpreted(console: Console) -> tuple[list[Fact], int]:
    """Kernels in triton's interpreter, on the CPU: that they run and agree. Their time says nothing."""
    # Triton decides when kernels are defined.
    os.environ["TRITON_INTERPRET"] = "1"
    began = time.perf_counter()
    difference = differs(INTERPRETED, "cpu")
    console.print(f"no GPU: kernels were interpreted on the CPU, and {difference or 'agree with those of torch'}")
    seconds = time.perf_counter() - began
    name = f"gpu/{INTERPRETED.name}/interpreted/seconds"
    return [fact(name, [seconds], "s", settings(INTERPRETED))], 0 if difference is None else 1


def main() -> int:
    """Run every case; for the exit code see the module."""
    parser = argparse.ArgumentParser(description="The trainer on one GPU, beside its peers on the same card.")
    names = [contender.name for contender in CONTENDERS]
    parser.add_argument("--quick", action="store_true", help="one small case; without a GPU, interpreted kernels")
    parser.add_argument("--case", action="append", choices=[case.name for case in CASES], help="may be repeated")
    parser.add_argument("--only", action="append", choices=names, help=f"besides {REFERENCE}; may be repeated")
    parser.add_argument("--tiles", action="store_true", help="time ways to cut the encoder's product, and no contender")
    parser.add_argument("--json", type=Path, help="write a list of {name, value, unit, config}")
    options = parser.parse_args()
    console, found, made = Console(width=140), list[Fact](), list[Mark]()
    if not torch.cuda.is_available():
        code = 0
        if options.quick:
            found, code = interpreted(console)
        else:
            console.print("no GPU here: nothing to measure")
        marks.write(options.json, found)
        return code
    contenders = [each for each in CONTENDERS if each.name in {REFERENCE, *(options.only or names)}]
    if wrong := missing(contenders):
        parser.error(wrong)
    card, runs = torch.cuda.get_device_name(0), True
    for case in QUICK if options.quick else CASES:
        if options.case and not options.quick and case.name not in options.case:
            continue
        tree = case.expansion == SIZE
        if difference := differs(replace(case, expansion=BASE) if tree else case, "cuda"):
            console.print(f"{case.name}: on {card} the kernels and torch part: {difference}")
            return 1
        torch.cuda.empty_cache()
        if options.tiles:
            found += tiled(case, card, console)
            marks.write(options.json, found)
            continue
        outcomes = race(
            case,
            TREES if tree else contenders,
            lambda line: console.print(line, style="dim"),
            10**12,
            {REFERENCE: BASE} if tree else None,
        )
        console.print(table(case, outcomes, card))
        found += facts(case, outcomes, card)
        made += judged(case, outcomes, peak_of(card))
        ours = [name for name in (REFERENCE, TREE) if name in outcomes]
        runs = runs and all(name in finished(outcomes) and outcomes[name].learns for name in ours)
        marks.write(options.json, found)
    missed = marks.show([] if options.quick else made, console)
    return 0 if runs and not missed else 1


if __name__ == "__main__":
    sys.exit(main())
