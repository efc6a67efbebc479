"""Text and tensors in: what calibrates a method and what a model is judged on."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pumice.core.errors import PumiceError
from pumice.engine.models import context_length, model_kind

Text = str | list[str]
Purpose = Literal["calibration", "evaluation"]
_SEPARATOR = "<|endoftext|>"
_FILE_SUFFIXES = {".txt", ".tokens", ".md", ".jsonl", ".json", ".parquet", ".raw"}
_MAX_CHARACTERS = 50_000_000


def default_text(purpose: Purpose = "calibration") -> str:
    """One half of a text that every Python has: the language reference that `help()` shows.

    Topics quote each other, so that paragraphs seen before are dropped (topics in alphabetical order); the first half
    of what is left calibrates and the second evaluates, and no paragraph is in both. The text differs a little
    between Python versions: compare numbers of one version only.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise PumiceError(
            "no data was given and this Python lacks pydoc_data (the default text): name a file."
        ) from error
    seen: set[str] = set()
    paragraphs: list[str] = []
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                paragraphs.append(paragraph.strip("\n"))
    first, second = halves(paragraphs)
    return "\n\n".join(first if purpose == "calibration" else second)


def halves(documents: Sequence[str]) -> tuple[list[str], list[str]]:
    """First and second half of a list of documents, by count."""
    middle = len(documents) // 2
    return list(documents[:middle]), list(documents[middle:])


def load_text(source: str | Path | None = None, *, purpose: Purpose = "calibration") -> Text:
    """Text from a local file, a Hugging Face dataset, or (None) the half of the default text meant for `purpose`.

    Files: plain text (one string, or documents where `<|endoftext|>` separates them), .jsonl (field "text", else the
    first string of a row), .parquet (likewise by column). "FILE#first" and "FILE#second" take half of a file. A
    dataset is "name", "name:config" or "name:config:split"; lines of WikiText are joined as its perplexity is
    usually taken. Raises PumiceError where nothing can be read.
    """
    if source is None:
        return default_text(purpose)
    path, half = Path(source).expanduser(), ""
    if not path.exists() and path.name.endswith(("#first", "#second")):
        name, half = str(path).rsplit("#", 1)
        path = Path(name)
    if path.is_file():
        text = _read_file(path)
        return _half(text, half) if half else text
    if path.is_dir():
        raise PumiceError(f"data {str(source)!r} is a folder: name a text, .jsonl or .parquet file in it.")
    if isinstance(source, Path) or path.suffix.lower() in _FILE_SUFFIXES or str(source).startswith((".", "/", "~")):
        raise PumiceError(f"data {str(source)!r} does not exist: name a text file or a Hugging Face dataset.")
    return _dataset(str(source))


def _half(text: Text, half: str) -> Text:
    if isinstance(text, list):
        return halves(text)[0 if half == "first" else 1]
    # A cut at a line end keeps words whole.
    middle = text.rfind("\n", 0, len(text) // 2 + 1) + 1 or len(text) // 2
    return text[:middle] if half == "first" else text[middle:]


def _read_file(path: Path) -> Text:
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            import pyarrow.parquet as parquet

            return _texts_of(parquet.read_table(path).to_pylist(), str(path))
        text = path.read_text(encoding="utf-8")
        if suffix == ".jsonl":
            return _texts_of((json.loads(line) for line in text.splitlines() if line.strip()), str(path))
    except (ValueError, OSError) as error:
        raise PumiceError(f"data {str(path)!r} cannot be read as {suffix or 'text'} ({error}).") from error
    if not text.strip():
        raise PumiceError(f"data={str(path)!r} is empty: name a file with text.")
    if _SEPARATOR not in text:
        return text
    return [document for part in text.split(_SEPARATOR) if (document := part.strip())]


def _texts_of(rows: Iterable[Any], source: str) -> list[str]:
    """The text of each row: a string itself, its field "text", or its first string; stops at 50 million characters."""
    texts, characters = [], 0
    for row in rows:
        text = row if isinstance(row, str) else None
        if isinstance(row, dict):
            text = row.get("text") or next((value for value in row.values() if isinstance(value, str)), None)
        if text:
            texts.append(text)
            characters += len(text)
        if characters > _MAX_CHARACTERS:
            break
    if not texts:
        raise PumiceError(f"data {source!r} has no text in its rows: name the column `text`.")
    return texts


def _dataset(source: str) -> Text:
    try:
        import datasets
    except ImportError as error:
        raise PumiceError(f"data {source!r} is no file, and reading a dataset needs `pip install datasets`.") from error
    name, config, split = [*source.split(":"), "", ""][:3]

    def load(streaming: bool) -> Text:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=streaming)
        texts = _texts_of(rows, source)
        return "\n\n".join(texts) if "wikitext" in name.lower() else texts

    try:
        try:
            return load(streaming=True)
        except (OSError, ConnectionError):
            # Streaming wants the network even for a dataset that lies in the cache.
            return load(streaming=False)
    except PumiceError:
        raise
    except Exception as error:
        # Dataset scripts and the hub client raise anything; for the user it is one case.
        raise PumiceError(
            f"data {source!r} is no local file, and no such dataset could be fetched ({type(error).__name__}): "
            "check the path, or the name (name:config:split) and the network connection."
        ) from error


def tokenize(text: Text, tokenizer: Any, *, bos: bool | None = None) -> Tensor:
    """All tokens of a text in one row, LongTensor [T].

    One string is encoded as the tokenizer does it (special tokens included). Documents are concatenated, each behind
    BOS; `bos` None asks the tokenizer: documents of a tokenizer that adds no BOS are joined by blank lines.
    """
    if isinstance(text, str):
        return torch.tensor(_encode(tokenizer, text), dtype=torch.long)
    start = getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        bos = start is not None and _encode(tokenizer, "a")[:1] == [start]
    if not bos:
        return torch.tensor(_encode(tokenizer, "\n\n".join(text)), dtype=torch.long)
    if start is None:
        raise PumiceError("bos=True needs a tokenizer with a beginning-of-text token: use bos=False.")
    ids: list[int] = []
    for document in text:
        ids.append(start)
        ids.extend(_encode(tokenizer, document, special=False))
    return torch.tensor(ids, dtype=torch.long)


def _encode(tokenizer: Any, text: str, special: bool = True) -> list[int]:
    # verbose=False: the tokenizer would warn that the text is longer than the model's context, which is the point.
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def random_windows(tokens: Tensor, samples: int, seqlen: int, seed: int = 0, *, source: Any = None) -> Tensor:
    """`samples` windows of `seqlen` tokens with random starts, [samples, seqlen]; they may overlap.

    `source`: what the tokens are from, for the PumiceError that a text too short for one window raises.
    """
    _check_count("samples", samples)
    _check_count("seqlen", seqlen)
    _check_length(tokens, seqlen, source)
    room = len(tokens) - seqlen
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, room + 1, (samples,), generator=generator)
    return tokens[starts[:, None] + torch.arange(seqlen)]


def consecutive_windows(tokens: Tensor, seqlen: int, max_windows: int | None = None, *, source: Any = None) -> Tensor:
    """Non-overlapping windows from the start of `tokens`, [n, seqlen]; the remainder is left out."""
    _check_count("seqlen", seqlen)
    _check_length(tokens, seqlen, source)
    count = len(tokens) // seqlen
    if max_windows is not None:
        _check_count("max_windows", max_windows)
        count = min(count, max_windows)
    return tokens[: count * seqlen].view(count, seqlen)


def calibration_windows(
    text: Text, tokenizer: Any, samples: int = 64, seqlen: int = 1024, seed: int = 0, *, source: Any = None
) -> Tensor:
    """Windows drawn at random from the tokenised text as SparseGPT and Wanda do, LongTensor [samples, seqlen]."""
    return random_windows(tokenize(text, tokenizer), samples, seqlen, seed, source=source)


def evaluation_windows(
    text: Text, tokenizer: Any, seqlen: int, max_windows: int | None = None, *, source: Any = None
) -> Tensor:
    """Non-overlapping windows of the tokenised text in order, LongTensor [n, seqlen]."""
    return consecutive_windows(tokenize(text, tokenizer), seqlen, max_windows, source=source)


def windows_from_documents(
    docs: Sequence[str],
    tokenizer: Any,
    samples: int,
    seqlen: int,
    bos: bool = True,
    *,
    random: bool = False,
    seed: int = 0,
) -> Tensor:
    """Windows [samples, seqlen] of the concatenation of BOS + document, documents stripped of surrounding blanks.

    The first `samples` non-overlapping windows (evaluation; fewer where the text ends), or with `random` windows with
    random starts (calibration).
    """
    tokens = tokenize([document.strip() for document in docs], tokenizer, bos=bos)
    return random_windows(tokens, samples, seqlen, seed) if random else consecutive_windows(tokens, seqlen, samples)


def _check_length(tokens: Tensor, seqlen: int, source: Any) -> None:
    if len(tokens) < seqlen:
        name = f"data={str(source)!r}" if isinstance(source, (str, Path)) else "data"
        raise PumiceError(
            f"{name} is too short: it has {len(tokens):,} tokens and one window needs seqlen = {seqlen:,}: give more "
            "text or a smaller seqlen."
        )


def is_text(data: Any) -> bool:
    """Whether `data` is, or names, text: None (the default text), a file or dataset name, or a list of documents."""
    return (
        data is None
        or isinstance(data, (str, Path))
        or (isinstance(data, list) and bool(data) and isinstance(data[0], str))
    )


def make_data(
    model: nn.Module,
    tokenizer: Any | None,
    data: Any = None,
    *,
    samples: int = 64,
    seqlen: int = 1024,
    seed: int = 0,
    batch_size: int = 1,
    labels: bool = False,
) -> list[dict[str, Any]]:
    """Calibration inputs of a model as keyword dicts for its forward, from whatever the user has.

    `data`: None (default text), a file or dataset name, documents, token ids [samples, T], a float tensor
    [samples, ...], a list of tensors, tuples or dicts, or a DataLoader. Ready-made batches are taken up to `samples`
    examples; the label of an (input, label) pair is kept as "labels" only if `labels`. Text models get windows of `seqlen` tokens (at most
    their context). Raises PumiceError where the data does not suit the model.
    """
    _check_count("samples", samples)
    _check_count("batch_size", batch_size)
    if is_text(data):
        _check_reads_text(model, tokenizer)
        text = data if isinstance(data, list) else load_text(data)
        seqlen = min(seqlen, context_length(model) or seqlen)
        both = bool(getattr(model.config, "is_encoder_decoder", False))
        windows = calibration_windows(text, tokenizer, samples, seqlen * (1 + both), seed, source=data)
        return _text_batches(model, tokenizer, windows, batch_size)
    if isinstance(data, Tensor):
        rows = data[None] if data.dim() == 1 else data
        return [as_inputs(model, batch) for batch in rows[:samples].split(batch_size)]
    if isinstance(data, dict):
        data = [data]
    if not isinstance(data, Iterable):
        raise PumiceError(f"data is a {type(data).__name__}: give text, tensors, dicts or a DataLoader.")
    batches, count = [], 0
    for batch in data:
        inputs = as_inputs(model, batch)
        if labels and isinstance(batch, (tuple, list)) and len(batch) > 1 and isinstance(batch[1], Tensor):
            inputs["labels"] = batch[1]
        count += next((len(value) for value in inputs.values() if isinstance(value, Tensor)), 1)
        batches.append(inputs)
        if count >= samples:
            break
    if not batches:
        raise PumiceError("data is empty: give at least one batch.")
    return batches


def as_inputs(model: nn.Module, batch: Any) -> dict[str, Any]:
    """One batch (tensor, (input, label) or mapping) as keyword arguments of the model's forward."""
    if hasattr(batch, "items"):
        return {name: value for name, value in batch.items() if value is not None}
    if isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    if not isinstance(batch, Tensor):
        raise PumiceError(f"data holds a {type(batch).__name__} where a tensor, a pair or a dict was expected.")
    parameters = [p for p in inspect.signature(model.forward).parameters.values() if p.kind is not p.VAR_POSITIONAL]
    main = getattr(model, "main_input_name", None)
    names = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
    if main is None and not names:
        raise PumiceError(f"data is a bare tensor and {type(model).__name__}.forward names no argument: give dicts.")
    return {main if main is not None else names[0]: batch}


def _check_reads_text(model: nn.Module, tokenizer: Any | None) -> None:
    if getattr(model, "main_input_name", "input_ids") != "input_ids" or model_kind(model) == "module":
        raise PumiceError(f"data is text and {type(model).__name__} does not read text: give its inputs as tensors.")
    if tokenizer is None:
        raise PumiceError("data is text and the model has no tokenizer: pass tokenizer=, or token ids as data.")


def _text_batches(model: nn.Module, tokenizer: Any, windows: Tensor, batch_size: int) -> list[dict[str, Any]]:
    """Windows of tokens as a text model reads them; the second half is the target of an encoder-decoder."""
    config: Any = model.config
    if getattr(config, "is_encoder_decoder", False):
        inputs, decoder = windows.chunk(2, dim=1)
        decoder = decoder.roll(1, dims=1)
        decoder[:, 0] = config.decoder_start_token_id or 0
        batches = zip(inputs.split(batch_size), decoder.split(batch_size), strict=True)
        return [{"input_ids": ids, "decoder_input_ids": target} for ids, target in batches]
    if model_kind(model) in ("encoder", "masked-lm", "text-classifier") and tokenizer.cls_token_id is not None:
        # These models always saw [CLS] ... [SEP]; a bare window would be another distribution.
        windows[:, 0], windows[:, -1] = tokenizer.cls_token_id, tokenizer.sep_token_id
    return [{"input_ids": ids} for ids in windows.split(batch_size)]


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise PumiceError(f"{name} = {value!r} must be a whole number of at least 1.")
