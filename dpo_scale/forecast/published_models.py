"""The configs of a few models by hub id, so that a plan for them needs no hub. Sizes as their makers state them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": 128009,
}
_LLAMA_8B = _LLAMA | {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
}  # fmt: skip
_LLAMA_70B = _LLAMA | {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
}  # fmt: skip
_QWEN: dict[str, Any] = {
    "vocab_size": 151936,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}
_QWEN_8B = _QWEN | {
    "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip
_QWEN_30B = _QWEN | {
    "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
    "num_attention_heads": 32, "num_key_value_heads": 4, "moe_intermediate_size": 768, "num_experts": 128,
    "num_experts_per_tok": 8,
}  # fmt: skip
_QWEN_235B = _QWEN_30B | {
    "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 94, "num_attention_heads": 64,
    "moe_intermediate_size": 1536,
}  # fmt: skip
_BY_ID = {
    "meta-llama/Llama-3.1-8B": _LLAMA_8B,
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_8B,
    "meta-llama/Llama-3.1-70B": _LLAMA_70B,
    "meta-llama/Llama-3.1-70B-Instruct": _LLAMA_70B,
    "Qwen/Qwen3-8B": _QWEN_8B,
    "Qwen/Qwen3-30B-A3B": _QWEN_30B,
    "Qwen/Qwen3-30B-A3B-Instruct-2507": _QWEN_30B,
    "Qwen/Qwen3-235B-A22B": _QWEN_235B,
    "Qwen/Qwen3-235B-A22B-Instruct-2507": _QWEN_235B,
}


def published_config(hub_id: str) -> PreTrainedConfig | None:
    """The transformers config of a model by its hub id; None if it is not one of these."""
    from transformers import AutoConfig

    stated = _BY_ID.get(hub_id)
    return None if stated is None else AutoConfig.for_model(**stated)
