"""recover: judges a dictionary of a synthetic harvest, on rows of a stream that nothing was trained on.

It stands in evaluate's place, under its name. First the dictionary's directions are matched with the true ones (see
`pipeline.matching`). Then a unit is a span of held-out rows: they are made, the dictionary and the baselines encode
them, and only sums are kept, of what fired together with its match among them. What was recovered is decided at the
end, once for all rows: by `pipeline.truth` of what is alive, and by `pipeline.recovery` as SynthSAEBench has it.

Beside the usual baselines stands an oracle, which encodes with the true directions, k of them: what the best dictionary
would reach with an encoder as simple as a dictionary's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import safetensors.torch
import torch

from cluster.pool import Resources
from cluster.storage.create import create_or_adopt
from cluster.storage.formats import read_tensors
from cluster.storage.path import StoragePath
from pipeline import metrics
from pipeline.activations.source import open_store
from pipeline.device import CARD_MEMORY, device
from pipeline.dictionary import baselines
from pipeline.dictionary.footprint import coding
from pipeline.dictionary.model import TopKDictionary
from pipeline.dictionary.stored import open_dictionary
from pipeline.generate import truth_bytes
from pipeline.matching import FEATURE_BYTES, Counterparts, counterparts, matches, searched, units
from pipeline.metrics import Moments
from pipeline.recovery import kept, summary
from pipeline.recovery.firings import Firings
from pipeline.recovery.matches import Links, Matches, links
from pipeline.stage import Committed, Estimate, Out, Params, Sources, Task
from pipeline.synthetic.draws import Split
from pipeline.synthetic.rows import Active, Source, rows
from pipeline.tokenize import parquet_body
from pipeline.truth import Represented, Tally, Truth, open_rows, open_truth, recovery, represented, resemblance
from schemas.layouts import KNOWN, METRICS
from schemas.manifest import Dictionary, Manifest
from schemas.records import ObjectEntry, Outputs, Unit
from schemas.tables import KNOWN as KNOWN_SCHEMA

UNIT_ROWS = 16_384
OURS = "dictionary"
ORACLE = "oracle"
# Of all features, dead ones too, as SynthSAEBench has them.
BENCHMARK = ("mcc", "f1", "uniqueness")
DETECTION = ("precision", "recall", "f1")
BASELINES = "baselines.safetensors"
# The oracle looks at every known feature on every row. With more of them that would take longer than all else.
ORACLE_FEATURES = 2**16

# Measured: a worker that has imported torch, transformers, zarr and pyarrow.
WORKER_MEMORY = 800 * 2**20


class RecoverParams(Params):
    """Identity of a judgement."""

    hook_point: str
    features: int
    k: int
    tokens: int
    baselines: tuple[str, ...]
    batch_tokens: int
    seed: int


class BaselineTask(Task):
    """Fit the baselines on a sample of what the dictionary was trained on."""

    harvest: Committed
    params: RecoverParams


class SpanTask(Task):
    """One span of held-out rows."""

    first: int
    end: int
    harvest: Committed
    train: Committed
    matches: ObjectEntry | None
    baselines: ObjectEntry | None
    params: RecoverParams
    gpus: float = 0.0


class RecoveryTask(Task):
    """Hold the features against the known ones, once it is known which of them fired."""

    harvest: Committed
    train: Committed
    counterparts: Counterparts
    sums: tuple[ObjectEntry, ...]
    baselines: ObjectEntry | None
    params: RecoverParams


def params(manifest: Manifest, dictionary: Dictionary | None, sources: Sources) -> RecoverParams:
    """See `Stage.params`."""
    assert dictionary is not None
    return RecoverParams(
        hook_point=dictionary.encoded,
        features=dictionary.size(sources.model.widths[dictionary.encoded]),
        k=dictionary.k,
        tokens=min(dictionary.evaluate.tokens, sources.corpus.heldout_rows),
        baselines=dictionary.evaluate.baselines,
        batch_tokens=manifest.harvest.batch_tokens,
        seed=dictionary.train.seed,
    )


def check(manifest: Manifest, dictionary: Dictionary | None, sources: Sources) -> None:
    """Nothing to refuse that others do not refuse."""


def estimate(manifest: Manifest, dictionary: Dictionary | None, sources: Sources) -> Estimate:
    """See `Stage.estimate`. A worker holds the true directions, also as an oracle, and every contender."""
    assert manifest.synthetic is not None
    assert dictionary is not None
    settings = params(manifest, dictionary, sources)
    width, known = sources.model.widths[settings.hook_point], manifest.synthetic.features
    spans, searches = -(-settings.tokens // UNIT_ROWS), units(settings.features, known)
    weights = (2 * width + 1) * settings.features * 4 * 2 * (1 + len(settings.baselines))
    truth = truth_bytes(manifest.synthetic) * (5 if known <= ORACLE_FEATURES else 3)
    batch = settings.batch_tokens * (width * 4 * 16 + min(known, ORACLE_FEATURES) * 8)
    on_card = bool(manifest.compute.gpus)
    batch += coding(dictionary, settings.features, width, settings.batch_tokens, on_card)
    span = min(UNIT_ROWS, settings.tokens) * (width * 8 + 4096)
    return Estimate(
        units=spans + searches + 1 + bool(settings.baselines),
        rows=settings.tokens,
        stored_bytes=(spans * 32 + FEATURE_BYTES) * (settings.features + known) + known * 64,
        objects=2 * (spans + searches) + 8,
        # Matching has candidates of both sides beside both sides' directions.
        memory=WORKER_MEMORY + truth + weights + (0 if on_card else batch) + span + (known + settings.features) * 1024,
        workers=manifest.compute.workers,
        gpus=manifest.compute.gpus,
        card=CARD_MEMORY + truth + weights + batch + span if on_card else 0,
    )


def run(inputs: Mapping[str, Committed], params: RecoverParams, out: Out) -> Outputs:
    """Fit the baselines, judge every span, hold the features against the known ones, add up."""
    harvest, train = inputs["harvest"], inputs["train"]
    resources = Resources(threads=out.compute.threads, gpus=out.compute.gpus)
    fitted = None
    if params.baselines:
        fitting = BaselineTask(unit="baselines", harvest=harvest, params=params)
        (fitted,) = out.map(fit_baselines, [fitting], resources)["baselines"].made.objects
    found = counterparts(harvest, train, params.hook_point, params.features, params.seed, out)
    tasks = [
        SpanTask(
            unit=f"{index:06d}",
            first=first,
            end=min(first + UNIT_ROWS, params.tokens),
            harvest=harvest,
            train=train,
            matches=found.matches,
            baselines=fitted,
            params=params,
            gpus=out.compute.gpus,
        )
        for index, first in enumerate(range(0, params.tokens, UNIT_ROWS))
    ]
    records = out.map(judge_span, tasks, resources)
    spans = [records[task.unit].made for task in tasks]
    matching = RecoveryTask(
        unit="recovery",
        harvest=harvest,
        train=train,
        counterparts=found,
        sums=tuple(unit.objects[0] for unit in spans),
        baselines=fitted,
        params=params,
    )
    recovered = out.map(judge_features, [matching], resources)["recovery"].made
    judged = summarize(params, train, out.path, spans, recovered.facts["recovery"])
    judged |= {name: recovered.facts[name] for name in ("benchmark", "by_fires") if name in recovered.facts}
    body = json.dumps(judged, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"
    # These belong to their units; the stage names them as well, so that whoever reads the stage finds them.
    return Outputs(
        objects=(out.write(METRICS, body),),
        facts={
            "metrics": judged[OURS],
            "known": recovered.objects[0].model_dump(mode="json"),
            "counterparts": found.model_dump(mode="json"),
        },
    )


def fit_baselines(task: BaselineTask, path: StoragePath) -> Unit:
    """Fit and keep the baselines."""
    settings = task.params
    sample_ND = open_store(task.harvest).slab(settings.hook_point, 0).x_ND.float()
    body = safetensors.torch.save(baselines.fit(sample_ND, settings.features, settings.k, settings.seed))
    create_or_adopt(path / BASELINES, body)
    return Unit(objects=(ObjectEntry.of(BASELINES, body),))


def _links(entry: ObjectEntry | None, truth: Truth, path: StoragePath) -> tuple[Represented, Matches, Links] | None:
    """What firings are counted by; None where there is nothing to count."""
    known = represented(truth)
    if entry is None or known is None:
        return None
    found = matches(entry, path)
    return known, found, links(found, known.parents_R)


def judge_span(task: SpanTask, path: StoragePath) -> Unit:
    """All sums of one span. Sums are kept as an object, because some of them are as wide as the dictionary."""
    settings = task.params
    where = device(task.gpus)
    truth, dictionary = open_truth(task.harvest, settings.hook_point), open_dictionary(task.train, where).dictionary
    contenders: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
    if task.baselines is not None:
        fitted = {name: value.to(where) for name, value in read_tensors(path, task.baselines).items()}
        contenders = {name: baselines.reconstructor(name, fitted, settings.k) for name in settings.baselines}
    source = open_rows(task.harvest, settings.hook_point)
    oracle = _oracle(truth, source, settings.k, where)
    tally, counting = Tally(dictionary.features, len(truth)), _links(task.matches, truth, path)
    firings = None if counting is None else Firings.none(counting[2])
    moments: dict[str, Moments] = {}
    made = rows(source, Split.HELDOUT, task.first, task.end)
    with torch.inference_mode():
        for first in range(0, len(made.active), settings.batch_tokens):
            x_ND = made.x_ND[first : first + settings.batch_tokens].to(where)
            z_NK, indices_NK = dictionary.encode(x_ND)
            active = made.active.sliced(first, first + len(x_ND))
            fired = z_NK.cpu(), indices_NK.cpu()
            tally.add(*fired, active)
            if counting is not None and firings is not None:
                firings.add(counting[2], *fired, *counting[0].active(active))
            seen = {OURS: Moments.of(x_ND, dictionary.decode(z_NK, indices_NK), z_NK)}
            seen |= {name: Moments.of(x_ND, contender(x_ND)) for name, contender in contenders.items()}
            if oracle is not None:
                code_NK, known_NK = oracle.encode(x_ND)
                seen[ORACLE] = Moments.of(x_ND, oracle.decode(code_NK, known_NK), code_NK)
            moments = {name: moments[name] + each if name in moments else each for name, each in seen.items()}
    tensors, numbers = {"fires": tally.fires_F, "known_fires": tally.known_fires_M}, dict[str, float]()
    tensors |= {} if firings is None else kept.counted(firings)
    for name, each in moments.items():
        wide, single = each.sums(name)
        tensors |= wide
        numbers |= single
    key, body = f"sums/{task.unit}.safetensors", safetensors.torch.save(tensors)
    create_or_adopt(path / key, body)
    return Unit(objects=(ObjectEntry.of(key, body),), rows=len(made.active), facts={"sums": numbers})


def _oracle(truth: Truth, source: Source, k: int, where: torch.device) -> TopKDictionary | None:
    """A dictionary of the represented true directions; None if there are none, or too many to look at."""
    known_RD = truth.directions_MD[truth.represented_M]
    if not 0 < len(known_RD) <= ORACLE_FEATURES:
        return None
    nothing = Active.of(1, np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    bias_D = source.plain(nothing)[0].float()
    oracle = TopKDictionary(known_RD.shape[1], len(known_RD), min(k, len(known_RD)))
    oracle.load_state_dict({"W_enc": known_RD, "b_enc": torch.zeros(len(known_RD)), "W_dec": known_RD, "b_dec": bias_D})
    return oracle.to(where)


def judge_features(task: RecoveryTask, path: StoragePath) -> Unit:
    """Which known features were found, and by which of the dictionary's; and the same of random directions."""
    settings = task.params
    truth, dictionary = open_truth(task.harvest, settings.hook_point), open_dictionary(task.train).dictionary
    tally = Tally(dictionary.features, len(truth))
    firings: Firings | None = None
    for entry in task.sums:
        sums = read_tensors(path, entry)
        tally.fires_F += sums["fires"]
        tally.known_fires_M += sums["known_fires"]
        if task.counterparts.matches is not None:
            more = kept.firings_of(sums)
            firings = more if firings is None else firings + more
    tally.rows = settings.tokens
    learned, true = task.counterparts.learned, task.counterparts.true
    both = (searched(learned, path), searched(true, path)) if learned else None
    found = recovery(dictionary.W_dec.detach(), truth, tally, both)
    judged = {OURS: found.metrics}
    if task.baselines is not None and "random" in settings.baselines:
        judged["random"] = resemblance(read_tensors(path, task.baselines)["random.W_dec"], truth)
    columns = {
        "feature": range(len(truth)),
        "represented": truth.represented_M.numpy(),
        "norm": truth.norm_M.numpy(),
        "parent": truth.parent_M.numpy(),
        "fires": truth.fires_M.numpy(),
        "nearest": found.nearest_M.numpy(),
        "cosine": found.cosine_M.numpy(),
        **{name: pa.nulls(len(truth), KNOWN_SCHEMA.field(name).type) for name in ("matched", *DETECTION)},
    }
    facts: dict[str, Any] = {"recovery": judged}
    counting = _links(task.counterparts.matches, truth, path)
    if counting is not None and firings is not None:
        known, by_weights, linked = counting
        whole = summary.recovery(by_weights, linked, firings, tally.fires_F > 0, known.fires_R)
        facts |= {"benchmark": whole.metrics, "by_fires": whole.bins}
        judged[OURS] |= {name: whole.metrics[name] for name in BENCHMARK}
        columns |= {"matched": _spread(whole.true["feature"], known)}
        columns |= {name: _spread(whole.true[name].float(), known) for name in DETECTION}
    body = parquet_body(pa.Table.from_pydict(columns, KNOWN_SCHEMA), 65_536)
    create_or_adopt(path / KNOWN, body)
    return Unit(objects=(ObjectEntry.of(KNOWN, body),), facts=facts)


def _spread(values_R: torch.Tensor, known: Represented) -> pa.Array:
    """A column of all known features, null where one has no direction."""
    place_M = known.place_M.numpy()
    return pa.array(values_R.numpy()[place_M.clip(0)], mask=place_M < 0)


def summarize(
    params: RecoverParams,
    train: Committed,
    path: StoragePath,
    spans: list[Unit],
    recovered: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    """Metrics out of the sums of all spans, and what was found of the known features."""
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, float] = {}
    for unit in spans:
        for name, value in read_tensors(path, unit.objects[0]).items():
            tensors[name] = tensors[name] + value if name in tensors else value
        for name, number in unit.facts["sums"].items():
            numbers[name] = numbers.get(name, 0.0) + number
    judged: dict[str, Any] = {
        "hook_point": params.hook_point,
        "width": train.facts["width"],
        "features": params.features,
        "k": params.k,
        "tokens": int(numbers[f"{OURS}.tokens"]),
        "dead_window_tokens": train.facts["dead_window_tokens"],
        "density_histogram": metrics.density_histogram(tensors["fires"], int(numbers[f"{OURS}.tokens"])),
        "known": {name: recovered[OURS][name] for name in ("known", "represented", "known_l0")},
    }
    for name in (OURS, *params.baselines, ORACLE):
        if f"{name}.tokens" not in numbers:
            continue
        judged[name] = metrics.reconstruction(Moments.of_sums(name, tensors, numbers))
        if name in params.baselines:
            # Baselines keep no code; PCA has k components on for every token, the random dictionary k features.
            judged[name]["l0"] = float(params.k)
            del judged[name]["l1"]
        found = recovered.get(name, {})
        judged[name] |= {key: found[key] for key in ("mmcs_found", "mmcs_true", "found", *BENCHMARK) if key in found}
    judged[OURS]["dead"] = train.facts["dead"]
    judged[OURS]["never_fired_heldout"] = float((tensors["fires"] == 0).double().mean())
    return judged
