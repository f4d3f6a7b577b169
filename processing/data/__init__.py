"""Rows, order, batches: what a run reads. These files never travel to the Hub."""
