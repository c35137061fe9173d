"""What makes a training step fast: packed rows through fused layers, each with a plain twin (docs/architecture.md)."""
