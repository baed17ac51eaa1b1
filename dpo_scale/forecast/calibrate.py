"""What the device at hand reaches, measured in at most a minute."""
