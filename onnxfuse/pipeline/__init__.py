"""Passes: what they promise, how they are found, chosen and run. Stands below every pass."""
