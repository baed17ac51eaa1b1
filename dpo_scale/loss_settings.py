"""What can be said about a preference loss, apart from torch, ranks and files (see `dpo_scale.losses`)."""
