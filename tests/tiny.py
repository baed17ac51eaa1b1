"""Tiny models, a tokenizer and preference rows that tests make for themselves, and a real launcher to run them with."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = "the cat sat on a mat while dogs ran far over hills and big red birds sang in tall green trees by water".split()


def save_tokenizer(folder: Path, *, chat: bool = True, seed: int = 0) -> None:
    """A byte-level BPE tokenizer of a few hundred tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(seed)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([" ".join(rng.choices(WORDS, k=12)) for _ in range(200)], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>" if chat else "<|endoftext|>", pad_token=None
    )
    if chat:
        tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)


def tiny_config(architecture: str, *, tied: bool = False):
    """A transformers config of a 2-layer model with a vocabulary of 384."""
    import transformers

    shared = {
        "vocab_size": 384,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if architecture == "llama":
        return transformers.LlamaConfig(**shared)
    if architecture == "qwen2":
        return transformers.Qwen2Config(**shared)
    if architecture == "qwen3":
        return transformers.Qwen3Config(**shared, head_dim=8)
    if architecture == "gemma2":
        return transformers.Gemma2Config(**shared, head_dim=8, sliding_window=16, final_logit_softcapping=3.0)
    if architecture == "gemma3":
        kinds = ["sliding_attention", "full_attention"]
        return transformers.Gemma3TextConfig(**shared, head_dim=8, sliding_window=16, layer_types=kinds)
    if architecture == "mistral":
        return transformers.MistralConfig(**shared, sliding_window=16)
    if architecture == "gpt_oss":
        return transformers.GptOssConfig(
            **shared, head_dim=8, sliding_window=16, num_local_experts=4, num_experts_per_tok=2
        )
    if architecture == "mixtral":
        return transformers.MixtralConfig(**shared, num_local_experts=4, num_experts_per_tok=2)
    if architecture in ("qwen3_moe", "qwen3_moe_with_a_dense_layer"):
        dense = [0] if architecture != "qwen3_moe" else []
        return transformers.Qwen3MoeConfig(
            **shared, head_dim=8, moe_intermediate_size=16, num_experts=8, num_experts_per_tok=2, mlp_only_layers=dense
        )
    if architecture == "olmoe":
        return transformers.OlmoeConfig(**shared, num_experts=8, num_experts_per_tok=2)
    if architecture == "gpt2":
        return transformers.GPT2Config(
            vocab_size=384, n_embd=32, n_layer=2, n_head=4, n_positions=256, tie_word_embeddings=tied,
            bos_token_id=0, eos_token_id=2,
        )  # fmt: skip
    if architecture == "cohere":
        return transformers.CohereConfig(**shared, logit_scale=0.25)
    raise AssertionError(architecture)


def save_model(folder: Path, architecture: str = "llama", *, tied: bool = False, seed: int = 0, scale: float = 4.0):
    """A random model with its tokenizer; weights are drawn wide so that log-probs are far from uniform."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture, tied=tied))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(scale)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_adapter(model: Path, folder: Path) -> Path:
    """A LoRA adapter for a model of ours, in peft's format, that changes what the model says."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model),
        LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"]),
    )
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.constant_(parameter, 0.1)
    adapted.save_pretrained(folder)
    return folder


def save_sharded(model: Path, folder: Path) -> Path:
    """The same weights and tokenizer, spread over many files."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(model).save_pretrained(folder, max_shard_size="40KB")
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def preference_rows(count: int, seed: int = 0) -> list[dict]:
    """Rows whose prompts and completions differ much in length."""
    rng = random.Random(seed)

    def text(low, high):
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    return [{"prompt": text(2, 12), "chosen": text(1, 18), "rejected": "no " + text(1, 18)} for _ in range(count)]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_overrides(folder: Path, *, architecture: str = "llama") -> list[str]:
    """Overrides of a run in fp32, 8 pairs a step, of a tiny model on 22 pairs with 5 held out, all made in `folder`."""
    save_model(folder / "start", architecture)
    write_rows(folder / "train.jsonl", preference_rows(22))
    write_rows(folder / "heldout.jsonl", preference_rows(5, seed=1))
    return [
        f"model.path={folder / 'start'}", "model.dtype=float32", f"data.train={folder / 'train.jsonl'}",
        f"data.eval={folder / 'heldout.jsonl'}", f"data.cache_dir={folder / 'cache'}", "train.global_batch_size=8",
        "train.micro_batch_size=2", "train.learning_rate=1e-3", "train.lr_scheduler_type=constant",
    ]  # fmt: skip


def run_jobs(folder: Path, jobs: list[dict], *, ranks: int = 2) -> list[str | None]:
    """Train all jobs of `distributed/run_many.py` in one launch; the messages of those that must be refused.

    What was printed is appended to `folder / "log.txt"`.
    """
    return _run_jobs(folder, jobs, ranks)[0]


def run_named_jobs(folder: Path, common: list[str], jobs: dict[str, list[str] | dict], *, ranks: int = 2) -> dict:
    """Train runs of those names, each in its own folder there, in one launch.

    Args:
        common: overrides of all runs.
        jobs: further overrides of each, or a job of `distributed/run_many.py` with these.

    Returns:
        What each run printed once it had its folder, and its refusal.
    """
    described = [{"overrides": job} if isinstance(job, list) else job for job in jobs.values()]
    described = [
        {**job, "overrides": [*common, *job["overrides"], f"output_dir={folder / name}"]}
        for name, job in zip(jobs, described, strict=True)
    ]
    messages, printed = _run_jobs(folder, described, ranks)
    said = {}
    for name, message in zip(jobs, messages, strict=True):
        _, _, after = printed.partition(f"run folder {folder / name}\n")
        said[name] = after.partition("run folder ")[0] + (message or "")
    return said


def _run_jobs(folder: Path, jobs: list[dict], ranks: int) -> tuple[list[str | None], str]:
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = launch("tests/distributed/run_many.py", folder / "jobs.json", ranks=ranks)
    with (folder / "log.txt").open("a") as log:
        log.write(done.stdout + done.stderr)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((folder / "jobs.json.messages").read_text()), done.stdout


def without_timings(records: list[dict]) -> list[dict]:
    """Metrics without those that differ between two runs of the same numbers."""
    timings = {"step_seconds", "tokens_per_second", "pairs_per_second", "mfu", "rank_idle", "peak_memory_bytes"}
    return [
        {name: value for name, value in record.items() if name not in timings and not name.startswith("time/")}
        for record in records
    ]


def launch(
    script: str,
    *arguments: object,
    ranks: int = 2,
    launcher: str = "deepspeed",
    cwd: Path = ROOT,
    timeout: int = 300,
    first_on_path: Path = ROOT,
) -> subprocess.CompletedProcess:
    """Run a script under a real launcher in its own process group, which is ended with it.

    Args:
        launcher: deepspeed, torchrun, or python (one rank).
        first_on_path: a folder of modules that go before installed ones.
    """
    binaries = Path(sys.executable).parent
    script = str(ROOT / script)
    command = {
        "deepspeed": [
            str(binaries / "deepspeed"), "-q", "--num_accelerators", str(ranks), "--master_port", str(free_port()),
        ],
        "torchrun": [
            str(binaries / "torchrun"), "--nproc_per_node", str(ranks), "--master_port", str(free_port()),
        ],
        "python": [sys.executable],
    }[launcher]  # fmt: skip
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": f"{first_on_path}:{ROOT}",
        "PYTHONWARNINGS": "ignore::FutureWarning",
    }
    process = subprocess.Popen(
        [*command, script, *map(str, arguments)],
        cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def read_metrics(run_dir: Path, phase: str = "train") -> list[dict]:
    lines = (Path(run_dir) / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["phase"] == phase]
