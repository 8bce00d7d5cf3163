"""The ETH/UCY study: truncated diffusion on pedestrians."""
