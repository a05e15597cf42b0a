"""What `proxy.config` is made of: values, faults, and the model. Import that, not these."""
