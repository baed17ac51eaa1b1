"""TRL's `DPOTrainer` over several jobs, in a process of its own (it keeps global state): `run_trl.py jobs.json`.

A job is {"model", "rows", "settings": of DPOConfig, "drop_after_end_of_turn", "output"}. `output` gets the trainer's
log of every step and the token ids that it trained on.
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer


class WithoutLineBreaks(DPOTrainer):
    """Ends completions at their end of turn: TRL scores the line break that ChatML writes behind it as well."""

    def _prepare_dataset(self, dataset, processing_class, *args, **kwargs):
        def cut(example):
            changed = {}
            for name in ("chosen_ids", "rejected_ids"):
                end = len(example[name]) - example[name][::-1].index(processing_class.eos_token_id)
                assert processing_class.decode(example[name][end:]) == "\n"
                changed[name] = example[name][:end]
            return changed

        return super()._prepare_dataset(dataset, processing_class, *args, **kwargs).map(cut)


def run(job: dict) -> None:
    trainer_class = WithoutLineBreaks if job["drop_after_end_of_turn"] else DPOTrainer
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    tokenizer.pad_token = tokenizer.eos_token
    trainer = trainer_class(
        AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32),
        args=DPOConfig(output_dir=job["output"] + ".folder", **job["settings"]),
        train_dataset=Dataset.from_list(job["rows"]),
        processing_class=tokenizer,
    )
    trainer.train()
    ids = [[row[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")] for row in trainer.train_dataset]
    log = [record for record in trainer.state.log_history if "loss" in record]
    Path(job["output"]).write_text(json.dumps({"log": log, "ids": ids}))


if __name__ == "__main__":
    for job in json.loads(Path(sys.argv[1]).read_text()):
        run(job)
