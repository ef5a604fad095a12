"""What hf_reg costs, as ratios against peers in one process. Run with `make bench`."""
