"""What a training step measures beside the loss's own metrics (`LossSettings.metric_names`).

A config may name these, so they are known before anything that measures them is loaded.
"""

# parts of a step whose share of its time is measured, in their order (`dpo_scale.observe.timing`)
PHASES = ("data", "reference", "forward", "backward", "optimizer", "communication")
ROUTER_AUX_LOSS = "router/aux_loss"  # of a model with a router (`dpo_scale.models.router`)
STEP_METRICS = (
    "grad_norm",
    "learning_rate",
    "epoch",
    "tokens",
    "pairs",
    "step_seconds",
    "tokens_per_second",
    "pairs_per_second",
    "mfu",  # where the device's peak is known
    "padding_fraction",
    "rank_idle",
    "peak_memory_bytes",
    *(f"time/{phase}" for phase in PHASES),
)
