"""Plumbing: what the flags mean, runs that go on after a kill, records, tables, pictures, the machine."""
