"""Plumbing: what the flags mean, resuming, records, tables, pictures, the machine."""
