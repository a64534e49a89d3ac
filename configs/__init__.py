"""Every setting of the daemon, model shape presets, and the embedded model."""
