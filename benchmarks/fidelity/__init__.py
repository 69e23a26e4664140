"""How faithful is each method? Linear datamodeling scores against retraining: `python -m benchmarks.fidelity`."""
