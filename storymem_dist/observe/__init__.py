"""Events and the back ends that observe them: console, JSONL, Weights & Biases, report."""
