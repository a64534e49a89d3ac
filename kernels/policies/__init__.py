"""How much of the host context a decode step reads, chosen by name."""
