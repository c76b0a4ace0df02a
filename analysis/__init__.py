"""Reading what searches and runs left on disk."""
