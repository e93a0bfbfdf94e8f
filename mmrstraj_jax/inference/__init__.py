"""Text out of the model: sampling rules, jitted prefill and decode, and the batching engine."""
