"""One step on many GPUs, on paper: what waiting for gradients costs, and what for ranks with other coins."""
