"""Selection rules of other systems, and of `HGAConfig`, simulated on dense K/V: one file a family of rules."""
