"""Decisions only: queues to Step, page accounting, feedback, mapping. No tensors and no clock."""
