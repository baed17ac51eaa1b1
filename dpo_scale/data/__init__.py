"""Preference files to token ids to batches: settings -> sources -> schemas -> tokenize -> cache -> dataset ->
layout.

Nothing is imported here, so that `dpo_scale.settings.data` stays quick to import.
"""
