"""Small tokenizers that differ in word marks, BOS, EOS and chat template, trained on a few sentences."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "What is the capital of France? The capital of France is Paris.",
    "Human: how are you today?\n\nAssistant: I am fine, thank you, and how are you?",
    "user system assistant tool the answer is no, the other answer is yes.\n",
    "Write a poem about rivers and hills. Rivers run down the hills to the sea.",
] * 5

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level(
    *,
    chat_template: str | None = None,
    bos: bool = False,
    adds_eos: bool = False,
    extra: tuple[str, ...] = (),
) -> Any:
    """Byte-level BPE like GPT-2's; `bos` puts <s> first, `adds_eos` the EOS last, as some models' do."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    backend.add_tokens(list(extra))  # added, but not special
    single = f"{'<s> ' if bos else ''}$A{' </s>' if adds_eos else ''}"
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = chat_template
    return tokenizer


def metaspace(*, bos: bool = True) -> Any:
    """BPE over "▁"-marked words with a marked first word, like SentencePiece models (Llama-2, Gemma)."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=460, special_tokens=special, show_progress=False)
    backend.train_from_iterator(SENTENCES, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
