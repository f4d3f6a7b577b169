"""What a run will take: memory, operations, hours."""
