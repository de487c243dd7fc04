"""The plan -> worker processes on this machine."""
