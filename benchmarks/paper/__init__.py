"""The SpotServe paper's evaluation on our simulator: its policies, its baselines, its traces, and ours beside them."""
