"""What ails a run: diagnoses of its log, its checkpoint and a small sample, in words."""
