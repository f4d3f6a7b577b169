"""Multi-process training: collective communication, and models sharded over processes."""
