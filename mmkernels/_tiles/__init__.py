"""The Triton engine of the losses over pairs of rows: tiles, products, configurations; no formula of a single loss."""
