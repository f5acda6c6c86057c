"""longscan inside other packages: Transformers, lm-evaluation-harness, and under the names of mamba-ssm."""
