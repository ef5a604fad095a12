"""Where a model can be touched: its attention, FFNs, residual branches, low-rank layers, weights and dropouts, found
without running it."""
