"""Foresight: what a run will need and cost, before anything is loaded. Torch-free but for `trace`."""
