"""The study of docs/EVIDENCE.md: `run.py` runs it."""
