"""What a run will need, before any weights are loaded: memory, time and price, from its config, data and cluster."""
