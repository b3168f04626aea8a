"""The trainer: what a run is (config), how it is written down (serialize), one train step, hooks, the run folder."""
