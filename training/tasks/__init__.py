"""Fine-tuning: a table of tasks and what each needs."""
