"""The suite. `python -m unittest` runs it; `python -m tests` does, and counts skips strictly."""
