"""What routed attention loses on real text."""
