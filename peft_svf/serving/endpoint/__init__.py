"""An OpenAI-compatible endpoint over transformers' continuous batching."""
