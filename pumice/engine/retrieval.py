"""What an encoder is worth: nDCG@10 on a collection with judgements, and how far its embeddings drift from dense."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pumice.core.errors import PumiceError
from pumice.engine.logits import computing, device_of, evaluating, logit_source, track
from pumice.engine.models import context_length


@dataclass
class RetrievalData:
    """Documents and queries by id, and judgements: query id -> document id -> gain (larger is better, 0 useless)."""

    documents: Mapping[str, str]
    queries: Mapping[str, str]
    qrels: Mapping[str, Mapping[str, float]]


def load_cranfield(folder: str | Path) -> RetrievalData:
    """Read the Cranfield collection (files cran.all.1400, cran.qry, cranqrel) from a folder.

    Judgements number the queries by position, not by their `.I`. Their codes run from 1 (a complete answer) to
    4 (minimum interest), which become gains 4 to 1; any other code is gain 0. Raises PumiceError where a file lacks.
    """
    root = Path(folder)
    texts = {}
    for name in ("cran.all.1400", "cran.qry", "cranqrel"):
        file = root / name
        if not file.is_file():
            raise PumiceError(f"data {str(folder)!r} is a folder without {name}: give a folder in Cranfield's format.")
        texts[name] = file.read_text(encoding="utf-8", errors="replace")
    documents = {number: _body(fields) for number, fields in _records(texts["cran.all.1400"])}
    queries = {str(i): _body(fields) for i, (_, fields) in enumerate(_records(texts["cran.qry"]), start=1)}
    qrels: dict[str, dict[str, float]] = {}
    for line in texts["cranqrel"].splitlines():
        if parts := line.split():
            code = int(parts[2])
            qrels.setdefault(parts[0], {})[parts[1]] = float(5 - code) if 1 <= code <= 4 else 0.0
    return RetrievalData(documents, queries, qrels)


def _records(text: str) -> list[tuple[str, dict[str, str]]]:
    """(number, fields by letter) of every `.I` record."""
    records = []
    for chunk in re.split(r"^\.I\s+", text, flags=re.MULTILINE)[1:]:
        number, *fields = re.split(r"^\.([A-Z])\s*$", chunk, flags=re.MULTILINE)
        pairs = zip(fields[::2], fields[1::2], strict=True)
        records.append((str(int(number)), {letter: " ".join(body.split()) for letter, body in pairs}))
    return records


def _body(fields: dict[str, str]) -> str:
    """Title and text; Cranfield repeats the title at the head of the text, where it is left out."""
    title, text = fields.get("T", ""), fields.get("W", "")
    return text if text.startswith(title) else f"{title} {text}"


def embed(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    batch_size: int = 32,
    max_length: int = 256,
    compute: str = "auto",
    progress: bool = False,
) -> Tensor:
    """Unit-length embeddings [N, D]: mean of the last hidden states over each text's tokens (at most `max_length`)."""
    if tokenizer is None:
        raise PumiceError("data is text and there is no tokenizer: pass tokenizer=.")
    limit = min(max_length, context_length(model) or max_length)
    # Texts of like length share a batch, so that little is padding.
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    parts: list[Tensor] = []
    with evaluating(model), computing(model, compute):
        source = logit_source(model)
        starts = range(0, len(order), batch_size)
        for start in track(starts, "embedding", progress):
            chosen = [texts[i] for i in order[start : start + batch_size]]
            batch = tokenizer(chosen, padding=True, truncation=True, max_length=limit, return_tensors="pt")
            inputs = {name: value.to(device_of(model)) for name, value in batch.items()}
            parts.extend(F.normalize(rows, dim=-1).cpu() for _, rows in source(inputs))
    embeddings = torch.cat(parts)
    return embeddings[torch.tensor(order).argsort()]


def ndcg(gains: Sequence[float], ideal: Sequence[float], k: int = 10) -> float:
    """Normalised discounted cumulative gain at k, linear: gains in ranked order against all gains of the query."""

    def dcg(values: Sequence[float]) -> float:
        return sum(gain / math.log2(rank + 2) for rank, gain in enumerate(values[:k]))

    best = dcg(sorted(ideal, reverse=True))
    return dcg(gains) / best if best > 0 else 0.0


def _judged(data: RetrievalData) -> list[str]:
    """Queries with at least one useful document."""
    return [query for query in data.queries if any(gain > 0 for gain in data.qrels.get(query, {}).values())]


def texts_of(data: RetrievalData) -> list[str]:
    """The texts to embed: all documents, then the queries that can be judged.

    Raises:
        PumiceError: no documents, or no query with a useful one.
    """
    judged = _judged(data)
    if not data.documents or not judged:
        raise PumiceError("retrieval data has no documents, or no query with a useful one: check the ids in qrels.")
    return [*data.documents.values(), *(data.queries[query] for query in judged)]


def ndcg_of(vectors: Tensor, data: RetrievalData) -> float:
    """Mean nDCG@10 of cosine ranking, from unit vectors [N, D] of `texts_of(data)`."""
    ids = list(data.documents)
    best = (vectors[len(ids) :] @ vectors[: len(ids)].T).topk(min(10, len(ids)), dim=1).indices.tolist()
    values = []
    for query, row in zip(_judged(data), best, strict=True):
        qrel = data.qrels[query]
        values.append(ndcg([qrel.get(ids[i], 0.0) for i in row], list(qrel.values())))
    return sum(values) / len(values)


def retrieval(
    model: nn.Module,
    data: RetrievalData,
    *,
    tokenizer: Any,
    dense: nn.Module | None = None,
    compute: str = "auto",
    progress: bool = True,
) -> dict[str, float]:
    """nDCG@10 of cosine ranking, and with `dense` its nDCG@10 and the mean cosine between the two embeddings.

    Queries without a useful document are left out; `queries` counts the others.
    """
    texts = texts_of(data)

    def vectors_of(net: nn.Module) -> Tensor:
        return embed(net, tokenizer, texts, compute=compute, progress=progress)

    vectors = vectors_of(model)
    result = {
        "ndcg@10": ndcg_of(vectors, data),
        "documents": float(len(data.documents)),
        "queries": float(len(_judged(data))),
    }
    if dense is not None:
        theirs = vectors_of(dense)
        result["dense_ndcg@10"] = ndcg_of(theirs, data)
        result["cosine"] = F.cosine_similarity(vectors, theirs, dim=-1).mean().item()
    return result
