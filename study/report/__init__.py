"""Records -> tables and plots: `python -m study.report`. It reads records and nothing else."""
