"""What is written down about contexts, and where: records, and the ledger that keeps them."""
