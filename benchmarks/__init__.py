"""What the product costs, for whoever changes it. README.md says how to run and read each part."""
