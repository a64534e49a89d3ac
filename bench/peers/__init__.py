"""Attention operators of other systems, each in a process of its own behind one protocol."""
