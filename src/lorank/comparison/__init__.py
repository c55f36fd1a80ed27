"""Methods side by side: the same data, several seeds, each at its best learning rate; quality, and what it costs."""
