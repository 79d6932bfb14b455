"""A guest that KVM runs: its program, its machine, its device state."""
