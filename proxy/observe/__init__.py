"""What others may see of a running proxy: metrics and logs."""
