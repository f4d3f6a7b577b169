"""The fine-tuning tasks, and the table that lists them."""
