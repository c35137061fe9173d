"""Fast training steps: packed rows through fused layers. Every operation has a plain twin (docs/architecture.md)."""
