"""SpotServe: serve large language models on preemptible GPUs so that nobody notices the preemptions."""

__version__ = "0.1.0"
