"""Cases that nobody wrote: arguments of the ops, damaged files, kills at any moment. Each comes from one number."""
