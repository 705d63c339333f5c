"""Pure tensor functions: ordering, summaries, routing and attention. They know no cache, store or model."""
