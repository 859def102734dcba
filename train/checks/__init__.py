"""What ``python -m train doctor`` looks at. Each check returns or yields findings, raises nothing foreseen, and leaves nothing behind."""
