"""Tiny random models and a word tokenizer, made in memory: no files, no hub."""

from collections.abc import Mapping
from typing import Any

import torch

WORDS = [f"w{i}" for i in range(96)]


def tokenizer(bos: bool = False) -> Any:
    """Word-level tokenizer over w0 .. w95 (ids 4 .. 99); with `bos` it puts <s> (id 1) before a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, cls_token="<s>", sep_token="</s>", **names)


def llama(seed: int = 0, **changes: Any) -> Any:
    """Random two-layer Llama with 100 tokens, width 32 and context 64, in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"num_hidden_layers": 2, "num_key_value_heads": 2, "initializer_range": 0.3}
    return _build(LlamaForCausalLM, LlamaConfig, _TEXT | sizes | changes, seed)


def bert(cls: str = "BertModel", **changes: Any) -> Any:
    """Random one-layer BERT (of any head) with 100 tokens, width 32 and context 64."""
    import transformers

    return _build(getattr(transformers, cls), transformers.BertConfig, _TEXT | changes)


def gemma2(**changes: Any) -> Any:
    """Random one-layer Gemma 2, whose logits can be soft-capped."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return _build(Gemma2ForCausalLM, Gemma2Config, _TEXT | {"head_dim": 8, "num_key_value_heads": 2} | changes)


def t5() -> Any:
    """Random one-layer T5 with 100 tokens and width 32."""
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    return _build(T5ForConditionalGeneration, T5Config, sizes | {"decoder_start_token_id": 0})


def vit() -> Any:
    """Random one-layer ViT classifier for 16 x 16 images and 3 classes."""
    from transformers import ViTConfig, ViTForImageClassification

    return _build(ViTForImageClassification, ViTConfig, _SIZES | {"image_size": 16, "patch_size": 8, "num_labels": 3})


_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
_TEXT = _SIZES | {"vocab_size": 100, "max_position_embeddings": 64}


def _build(cls: Any, config: Any, options: Mapping[str, Any], seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return cls(config(**options)).eval()


def words(count: int, seed: int = 0) -> str:
    """`count` random words that the tokenizer knows."""
    picks = torch.randint(0, len(WORDS), (count,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[i] for i in picks.tolist())
