"""The files of a run: run folder, shots, records, videos, prompt embeddings. Knows nothing of replicas or models."""
